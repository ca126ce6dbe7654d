"""OLMoE's ablation with 8 experts of 8192, top-1 (2409.02060, section 4; public as cx5)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import olmoe

PUBLISHED = ()


def get_config() -> ConfigDict:
    return olmoe.olmoe("olmoe_8e_k1", experts=8, k=1, expert_dim=8192)
