"""T5-Large, the dense baseline of Switch (Raffel et al. 2020, 1910.10683; 2101.03961 table 9)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import t5

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 739e6, 0.003, "Switch table 9"),
    PublishedNumber("flops_per_sequence.kaplan", 425e9, 0.005, "Switch table 9"),
)


def get_config() -> ConfigDict:
    return t5.large_size("t5_large")
