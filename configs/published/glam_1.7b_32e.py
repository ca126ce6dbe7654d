"""GLaM 1.7B with 32 experts (Du et al. 2021, 2112.06905).

The printed 20B cannot be right: the formula that fits all other rows gives 13.96B.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import glam

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber(
        "total", 20e9, 0.01, "GLaM table 4", wrong="13.96B by the closed form that fits all others"
    ),
    PublishedNumber("active.embedding_and_head", 1.878e9, 0.0015, "GLaM table 4"),
)


def get_config() -> ConfigDict:
    return glam.glam("glam_1.7b_32e", "1.7b", experts=32)
