"""gpt-oss-20b (OpenAI 2025, model card): biases, attention sinks, windows of 128 tokens."""

from ml_collections import ConfigDict
from moe_jax.configs.families import gpt_oss

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 20.915e9, 0.001, "released weights"),
    PublishedNumber("total", 20.91e9, 0.001, "model card"),
    PublishedNumber("active.no_input_embedding", 3.608e9, 0.001, "released weights"),
    PublishedNumber("active.no_input_embedding", 3.61e9, 0.001, "model card"),
)


def get_config() -> ConfigDict:
    return gpt_oss.gpt_oss("gpt_oss_20b", layers=24, experts=32)
