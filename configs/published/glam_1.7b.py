"""GLaM 1.7B, dense (Du et al. 2021, 2112.06905)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import glam

from moe_jax.counting import PublishedNumber

PUBLISHED = (PublishedNumber("total", 1.7e9, 0.015, "GLaM table 4"),)


def get_config() -> ConfigDict:
    return glam.glam("glam_1.7b", "1.7b")
