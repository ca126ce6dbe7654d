"""fairseq's 52B mixture-of-experts language model (Artetxe et al. 2021, 2112.10684, table 1)."""

from ml_collections import ConfigDict
from moe_jax.configs.families import fairseq

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 52e9, 0.03, "Artetxe table 1"),
    PublishedNumber("total", 51.80e9, 0.001, "its closed form without biases"),
)


def get_config() -> ConfigDict:
    return fairseq.language_model("fairseq_moe_52b", layers=24, width=1024, heads=16)
