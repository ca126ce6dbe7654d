"""MegaBlocks' MoE-XS (Gale et al. 2022, 2211.15841, table 1)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import megablocks

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 839e6, 0.001, "MegaBlocks table 1"),
    PublishedNumber("total", 838.5e6, 0.001, "its closed form"),
)


def get_config() -> ConfigDict:
    return megablocks.dropless("moe_xs", layers=6, width=512)
