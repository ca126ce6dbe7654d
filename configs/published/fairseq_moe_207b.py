"""fairseq's 207B mixture-of-experts language model (Artetxe et al. 2021, 2112.10684, table 1)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import fairseq

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 207e9, 0.03, "Artetxe table 1"),
    PublishedNumber("total", 207.08e9, 0.001, "its closed form without biases"),
)


def get_config() -> ConfigDict:
    return fairseq.language_model("fairseq_moe_207b", layers=24, width=2048, heads=32)
