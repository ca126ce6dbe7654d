"""Mistral Small 4 (Mistral AI, March 2026), the text model: 128 experts, of which 4 are active.

The sizes are the defaults of Mistral4Config in transformers 5.24. The printed numbers are those of
Mistral's announcement, as a news page quotes it.
"""

import math

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import open_models

from moe_jax.counting import PublishedNumber

_SOURCE = "mistral.ai, Introducing Mistral Small 4"
PUBLISHED = (
    PublishedNumber("total", 119e9, 0.01, _SOURCE),
    PublishedNumber("active.no_input_embedding", 6e9, 0.02, _SOURCE),
    PublishedNumber(
        "active.embedding_and_head",
        8e9,
        0.1,
        _SOURCE,
        wrong="6.6G with both matrices; no closed form of these sizes gives 8G",
    ),
)


def get_config() -> ConfigDict:
    config = open_models.decoder("mistral_small_4", layers=36, width=4096, heads=(32, 32, 64))
    model = config.model
    model.mlp_dim = 12288
    model.positions.interleaved = True
    model.positions.scaling = common.part(
        "YarnScaling", factor=128.0, original_length=8192, attention_factor=1.0
    )
    scale = (0.1 * math.log(128.0) + 1) ** 2 / math.sqrt(128)
    model.attention = common.part(
        "Latent", query_rank=1024, kv_rank=256, plain_dim=64, scale=scale, temperature=0.1
    )
    model.moe.update(layers=tuple(range(36)), num_experts=128, expert_dim=2048)
    model.moe.shared.hidden = 2048
    model.moe.router = common.router("qwen3_moe", k=4)
    config.data.update(vocab_size=131072, seq_length=8192, batch_size=1024)
    return config
