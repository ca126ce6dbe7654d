"""OLMoE's ablation with 64 experts of 1024, top-8 (2409.02060, section 4; public as fine1)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import olmoe

PUBLISHED = ()


def get_config() -> ConfigDict:
    return olmoe.olmoe("olmoe_64e_k8", experts=64, k=8, expert_dim=1024)
