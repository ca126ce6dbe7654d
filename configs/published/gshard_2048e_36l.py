"""GShard M4, 2048 experts, 36 layers (Lepikhin et al. 2020, 2006.16668, table 1 and appendix A.2).

Half of the layers are in the encoder. The printed weights are rounded down by 3 to 5 %: the experts
alone have 618.5B. The source and target vocabularies of 64k and 32k are one table of 96k here.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import gshard

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("parameters.experts", 600e9, 0.05, "GShard table 1"),
    PublishedNumber(
        "experts",
        36684,
        1e-06,
        "GShard table 1",
        wrong="a misprint of 36864 = 2048 x 18",
    ),
)


def get_config() -> ConfigDict:
    return gshard.m4("gshard_2048e_36l", layers=36, experts=2048)
