"""Text model of GLM-4.5V (2507.01006), without the vision tower and without a lookahead.

The sizes are those of ``text_config`` in the release's config.json as transformers 5.7 prints it:
GLM-4.5-Air with another base of the rotations.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import glm_4_5

from moe_jax.counting import PublishedNumber

_SOURCE = "zai-org/GLM-4.5 README, on GLM-4.5-Air, which is its text model"
PUBLISHED = (
    PublishedNumber("total", 106e9, 0.02, _SOURCE),
    PublishedNumber("active.no_input_embedding", 12e9, 0.07, _SOURCE),
)


def get_config() -> ConfigDict:
    return glm_4_5.air("glm_4.5v", base=1e4, lookahead=0)
