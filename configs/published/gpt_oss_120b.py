"""gpt-oss-120b (OpenAI 2025, model card): biases, attention sinks, windows of 128 tokens."""

from ml_collections import ConfigDict
from moe_jax.configs.families import gpt_oss

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 116.829e9, 0.001, "released weights"),
    PublishedNumber("total", 116.83e9, 0.001, "model card"),
    PublishedNumber("active.no_input_embedding", 5.133e9, 0.001, "released weights"),
    PublishedNumber("active.no_input_embedding", 5.13e9, 0.001, "model card"),
)


def get_config() -> ConfigDict:
    return gpt_oss.gpt_oss("gpt_oss_120b", layers=36, experts=128)
