"""Expert Choice 8B with 64 experts, capacity factor 2 (Zhou et al. 2022, 2202.09368, table 1).

Other variants are overrides: ``router.capacity_factor`` 0.5 or 1, and the router
``expert_choice_capped`` with ``experts_per_token`` 2 or 3.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import glam

from moe_jax.counting import PublishedNumber

PUBLISHED = (PublishedNumber("total", 143e9, 0.002, "Expert Choice table 1"),)


def get_config() -> ConfigDict:
    return glam.expert_choice("ec_8b_64e", "8b", experts=64)
