"""GShard M4, 128 experts, 36 layers (Lepikhin et al. 2020, 2006.16668, table 1 and appendix A.2).

Half of the layers are in the encoder. The printed weights are rounded down by 3 to 5 %: the experts
alone have 38.7B. The source and target vocabularies of 64k and 32k are one table of 96k here.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import gshard

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("parameters.experts", 37e9, 0.05, "GShard table 1"),
    PublishedNumber("experts", 2304, 1e-06, "GShard table 1"),
)


def get_config() -> ConfigDict:
    return gshard.m4("gshard_128e_36l", layers=36, experts=128)
