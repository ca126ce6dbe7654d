"""The dense twin of OLMoE's ablations, one layer of 8192 for 8 active experts of 1024."""

from ml_collections import ConfigDict
from moe_jax.configs.families import olmoe

PUBLISHED = ()


def get_config() -> ConfigDict:
    return olmoe.dense("olmoe_dense")
