"""Llama 4 Maverick, the text model (Meta 2025, released configuration)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import llama4

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 400.71e9, 0.001, "released weights, text"),
    PublishedNumber("total", 400e9, 0.002, "model card"),
    PublishedNumber("active.embedding_and_head", 17.18e9, 0.001, "released weights"),
)


def get_config() -> ConfigDict:
    return llama4.llama4("llama4_maverick", experts=128, every=2)
