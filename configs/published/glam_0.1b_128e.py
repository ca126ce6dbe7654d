"""GLaM 0.1B with 128 experts (Du et al. 2021, 2112.06905)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import glam

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 3.7e9, 0.01, "GLaM table 4"),
    PublishedNumber(
        "active.embedding_and_head",
        145e6,
        0.02,
        "GLaM table 4",
        wrong="5 % below any closed form; the difference to the dense model is exact",
    ),
)


def get_config() -> ConfigDict:
    return glam.glam("glam_0.1b_128e", "0.1b", experts=128)
