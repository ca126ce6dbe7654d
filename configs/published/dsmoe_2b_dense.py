"""DeepSeekMoE's comparison at 2B parameters: dense (Dai et al. 2024, 2401.06066, table 1)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import dsmoe

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 0.2e9, 0.06, "DeepSeekMoE table 1"),
    PublishedNumber("training_flops_per_sequence.full", 2.9e12, 0.012, "DeepSeekMoE table 1"),
)


def get_config() -> ConfigDict:
    return dsmoe.two_billion("dsmoe_2b_dense", None)
