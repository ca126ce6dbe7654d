"""GLM-4.5-Air (2508.06471): rotation of half a head, biases, a lookahead.

The sizes are those of zai-org/GLM-4.5-Air: the defaults of Glm4MoeConfig in transformers, and the
page of GLM 4.5 in the documentation of Megatron-Bridge. The released config.json sets the biases.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import glm_4_5

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 106e9, 0.01, "zai-org/GLM-4.5 README"),
    PublishedNumber("active.no_input_embedding", 12e9, 0.07, "zai-org/GLM-4.5 README"),
)


def get_config() -> ConfigDict:
    return glm_4_5.air("glm_4.5_air", base=1e6, lookahead=1)
