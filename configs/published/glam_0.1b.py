"""GLaM 0.1B, dense (Du et al. 2021, 2112.06905)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import glam

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber(
        "total",
        130e6,
        0.02,
        "GLaM table 4",
        wrong="5 % below any closed form; the others fit theirs",
    ),
)


def get_config() -> ConfigDict:
    return glam.glam("glam_0.1b", "0.1b")
