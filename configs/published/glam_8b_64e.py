"""GLaM 8B with 64 experts (Du et al. 2021, 2112.06905)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import glam

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 143e9, 0.002, "GLaM table 4"),
    PublishedNumber("active.embedding_and_head", 9.8e9, 0.001, "GLaM table 4"),
)


def get_config() -> ConfigDict:
    return glam.glam("glam_8b_64e", "8b", experts=64)
