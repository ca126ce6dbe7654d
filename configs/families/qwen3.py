"""Qwen3-30B-A3B (Yang et al. 2025, 2505.09388): the settings that its releases share."""

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import open_models


def qwen3_30b_a3b(name: str, *, base: float) -> ConfigDict:
    """Returns a model of Qwen3-30B-A3B's sizes.

    Args:
        name: Name of the model.
        base: Base of the rotations.
    """
    config = open_models.decoder(name, layers=48, width=2048, heads=(32, 4, 128))
    model = config.model
    model.mlp_dim = 6144
    model.positions.base = base
    model.attention.qk_norm = "head"
    model.moe.update(every=1, num_experts=128, expert_dim=768)
    model.moe.router = common.router("qwen3_moe")
    config.data.update(vocab_size=151936, seq_length=32768, batch_size=128)
    return config
