"""fairseq's 15B mixture-of-experts language model (Artetxe et al. 2021, 2112.10684, table 1)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import fairseq

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 15e9, 0.03, "Artetxe table 1"),
    PublishedNumber("total", 14.59e9, 0.001, "its closed form without biases"),
)


def get_config() -> ConfigDict:
    return fairseq.language_model("fairseq_moe_15b", layers=12, width=768, heads=12)
