"""OLMoE's ablation with 31 experts of 2048, top-3, and a shared expert (2409.02060, 4.1.3)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import olmoe

PUBLISHED = ()


def get_config() -> ConfigDict:
    config = olmoe.olmoe("olmoe_32e_shared", experts=31, k=3, expert_dim=2048)
    config.model.moe.shared.hidden = 2048
    return config
