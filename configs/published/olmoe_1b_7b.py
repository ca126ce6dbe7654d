"""OLMoE-1B-7B (Muennighoff et al. 2024, 2409.02060)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import olmoe

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 6.919e9, 0.001, "released weights"),
    PublishedNumber("active.embedding_and_head", 1.282e9, 0.001, "released weights"),
    PublishedNumber("total", 6.9e9, 0.005, "OLMoE table 1"),
    PublishedNumber("active.embedding_and_head", 1.3e9, 0.02, "OLMoE table 1"),
)


def get_config() -> ConfigDict:
    return olmoe.olmoe("olmoe_1b_7b", experts=64, k=8, expert_dim=1024)
