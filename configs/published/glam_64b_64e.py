"""GLaM 64B with 64 experts, 1.2T parameters (Du et al. 2021, 2112.06905).

The printed 180G FLOPs per token do not follow from the table (189G without the embedding).
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import glam

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 1.2e12, 0.04, "GLaM table 4"),
    PublishedNumber("active.embedding_and_head", 96.6e9, 0.001, "GLaM table 4"),
    PublishedNumber(
        "flops_per_token.forward",
        180e9,
        0.01,
        "GLaM section 5",
        wrong="not derivable from the table",
    ),
)


def get_config() -> ConfigDict:
    return glam.glam("glam_64b_64e", "64b", experts=64, vocab_size=256_000)
