"""fairseq's 1.1T mixture-of-experts language model (Artetxe et al. 2021, 2112.10684, table 1)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import fairseq

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 1.1e12, 0.03, "Artetxe table 1"),
    PublishedNumber("total", 1104.0e9, 0.001, "its closed form without biases"),
)


def get_config() -> ConfigDict:
    return fairseq.language_model("fairseq_moe_1.1t", layers=32, width=4096, heads=32)
