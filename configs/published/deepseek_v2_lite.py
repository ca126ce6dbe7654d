"""DeepSeek-V2-Lite (2405.04434, appendix B): latent attention without a latent of queries.

YaRN multiplies scores by the square of ``0.1 * 0.707 * log(40) + 1``.
"""

import math

from ml_collections import ConfigDict
from moe_jax.configs import common

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 15.706e9, 0.001, "released weights"),
    PublishedNumber("total", 15.7e9, 0.001, "DeepSeek-V2 appendix B"),
    PublishedNumber("active.no_input_embedding", 2.451e9, 0.001, "released weights"),
    PublishedNumber("active.no_input_embedding", 2.4e9, 0.025, "DeepSeek-V2 appendix B"),
)


def get_config() -> ConfigDict:
    config = common.base("deepseek_v2_lite")
    model = config.model
    model.update(
        num_layers=27,
        width=2048,
        num_heads=16,
        head_dim=128,
        mlp_dim=10944,
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
    scale = (0.1 * 0.707 * math.log(40.0) + 1) ** 2 / math.sqrt(192)
    model.attention = common.part("Latent", scale=scale)
    model.moe.shared.hidden = 2 * 1408
    model.moe.update(layers=tuple(range(1, 27)), num_experts=64, expert_dim=1408)
    model.moe.router = common.router(
        "deepseek_v2", scale=1.0, devices=1, keep_devices=1, drop=False
    )
    config.data.update(vocab_size=102400, seq_length=4096, batch_size=4608)
    return config
