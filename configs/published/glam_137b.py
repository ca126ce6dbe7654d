"""GLaM 137B, dense (Du et al. 2021, 2112.06905)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import glam

from moe_jax.counting import PublishedNumber

PUBLISHED = (PublishedNumber("total", 137e9, 0.02, "GLaM table 4"),)


def get_config() -> ConfigDict:
    return glam.glam("glam_137b", "137b", vocab_size=256_000)
