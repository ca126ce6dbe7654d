"""Llama 4 Scout, the text model (Meta 2025, released configuration)."""

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import llama4

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 107.77e9, 0.001, "released weights, text"),
    PublishedNumber("total", 109e9, 0.012, "model card, with 0.81B of the vision tower"),
    PublishedNumber("active.embedding_and_head", 17.17e9, 0.001, "released weights"),
)


def get_config() -> ConfigDict:
    config = llama4.llama4("llama4_scout", experts=16, every=1)
    config.model.attention.qk_norm = "unit"
    config.model.positions.scaling = common.part("Llama3Scaling", factor=8.0)
    return config
