"""DeepSeek-V3 (2412.19437): latent attention, 256 experts, balanced by a bias on the selection.

YaRN multiplies scores by the square of ``0.1 * log(40) + 1``. The count of the multi-token
prediction module is separate and omits embedding and head, which the module shares.
"""

import math

from ml_collections import ConfigDict
from moe_jax.configs import common

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 671.026e9, 0.001, "released weights"),
    PublishedNumber("total", 671e9, 0.001, "DeepSeek-V3 section 1"),
    PublishedNumber("lookahead", 11.5e9, 0.01, "release notes, unique weights of the module"),
    PublishedNumber("active.embedding_and_head", 37e9, 0.016, "DeepSeek-V3 section 1"),
    PublishedNumber("active.no_input_embedding", 36.63e9, 0.001, "released weights"),
    PublishedNumber("active.no_input_embedding", 36.7e9, 0.003, "release notes"),
)


def get_config() -> ConfigDict:
    config = common.base("deepseek_v3")
    model = config.model
    model.update(
        num_layers=61,
        lookahead=1,
        width=7168,
        num_heads=128,
        head_dim=128,
        mlp_dim=18432,
        gated=True,
        activation="silu",
        tie_embeddings=False,
        scale_embedding=False,
        compute_dtype="bfloat16",
        remat="full",
    )
    model.positions.interleaved = True
    model.positions.scaling = common.part(
        "YarnScaling", factor=40.0, original_length=4096, attention_factor=1.0
    )
    scale = (0.1 * math.log(40.0) + 1) ** 2 / math.sqrt(192)
    model.attention = common.part("Latent", query_rank=1536, scale=scale)
    model.moe.shared.hidden = 2048
    model.moe.update(layers=tuple(range(3, 61)), num_experts=256, expert_dim=2048)
    model.moe.router = common.router("deepseek_v3")
    config.data.update(vocab_size=129280, seq_length=4096, batch_size=15360)
    return config
