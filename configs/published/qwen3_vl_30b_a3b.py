"""Text model of Qwen3-VL-30B-A3B (Qwen 2025), without the vision tower.

The sizes are those of ``text_config`` in the release's config.json: Qwen3-30B-A3B with another base
of the rotations.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import qwen3

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 30e9, 0.02, "name of the release"),
    PublishedNumber("active.no_input_embedding", 3e9, 0.02, "name of the release"),
)


def get_config() -> ConfigDict:
    return qwen3.qwen3_30b_a3b("qwen3_vl_30b_a3b", base=5e6)
