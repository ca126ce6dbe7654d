"""GLaM 1.7B with 64 experts (Du et al. 2021, 2112.06905)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import glam

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 27e9, 0.01, "GLaM table 4"),
    PublishedNumber("active.embedding_and_head", 1.879e9, 0.0015, "GLaM table 4"),
)


def get_config() -> ConfigDict:
    return glam.glam("glam_1.7b_64e", "1.7b", experts=64)
