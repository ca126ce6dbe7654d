"""OLMoE's ablation with 32 experts of 2048, top-4 (2409.02060, section 4; public as fine)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import olmoe

PUBLISHED = ()


def get_config() -> ConfigDict:
    return olmoe.olmoe("olmoe_32e_k4", experts=32, k=4, expert_dim=2048)
