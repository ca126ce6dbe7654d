"""Qwen3-30B-A3B (Yang et al. 2025, 2505.09388)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import qwen3

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 30.532e9, 0.001, "released weights"),
    PublishedNumber("total", 30.5e9, 0.002, "Qwen3 report"),
    PublishedNumber("active.embedding_and_head", 3.3e9, 0.02, "Qwen3 report"),
    PublishedNumber("active.no_input_embedding", 3.042e9, 0.001, "released weights"),
)


def get_config() -> ConfigDict:
    return qwen3.qwen3_30b_a3b("qwen3_30b_a3b", base=1e6)
