"""The dense model of OLMoE's ablations, with layers of width 8192 for 8 experts of 1024."""

from ml_collections import ConfigDict
from moe_jax.configs.families import olmoe

PUBLISHED = ()


def get_config() -> ConfigDict:
    return olmoe.dense("olmoe_dense")
