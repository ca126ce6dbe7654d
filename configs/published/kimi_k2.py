"""Kimi K2 (2507.20534): DeepSeek-V3 with 384 experts, 64 heads and no groups.

The sizes are those of moonshotai/Kimi-K2-Instruct, as the README of MoonshotAI/Kimi-K2 and
KimiK2Provider of Megatron-Bridge (models/kimi/kimi_provider.py) state them.
"""

import math

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import open_models

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 1e12, 0.03, "MoonshotAI/Kimi-K2 README"),
    PublishedNumber("active.no_input_embedding", 32e9, 0.015, "MoonshotAI/Kimi-K2 README"),
)


def get_config() -> ConfigDict:
    config = open_models.decoder("kimi_k2", layers=61, width=7168, heads=(64, 64, 128))
    model = config.model
    model.mlp_dim = 18432
    model.positions.update(base=5e4, interleaved=True)
    model.positions.scaling = common.part(
        "YarnScaling",
        factor=32.0,
        original_length=4096,
        beta_fast=1.0,
        beta_slow=1.0,
        attention_factor=1.0,
    )
    scale = (0.1 * math.log(32.0) + 1) ** 2 / math.sqrt(192)
    model.attention = common.part("Latent", query_rank=1536, scale=scale)
    model.moe.update(layers=tuple(range(1, 61)), num_experts=384, expert_dim=2048)
    model.moe.shared.hidden = 2048
    model.moe.router = common.router("deepseek_v3", groups=1, keep_groups=1, scale=2.827)
    config.data.update(vocab_size=163840, seq_length=4096, batch_size=16384)
    return config
