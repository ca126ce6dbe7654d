"""FlexOLMo with 8 experts (2507.07024): one public expert and seven of domains.

The sizes are the defaults of FlexOlmoConfig in transformers 5.24.0, those of FlexOlmo-7x7B-1T,
which has 7 experts. No source that was read gives the number of active experts. With 4 of them the
abstract's 20 billion active parameters are met, so that number is no claim here.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import olmoe

from moe_jax.counting import PublishedNumber

PUBLISHED = (PublishedNumber("total", 37e9, 0.02, "2507.07024, abstract"),)


def get_config() -> ConfigDict:
    config = olmoe.olmoe("flex_olmo_37b", experts=8, k=4, expert_dim=11008)
    model = config.model
    model.update(num_layers=32, width=4096, num_heads=32)
    model.norm.update(eps=1e-6, place="output")
    model.positions.base = 500000.0
    config.data.vocab_size = 100352
    return config
