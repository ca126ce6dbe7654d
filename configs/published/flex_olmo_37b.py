"""FlexOLMo with 8 experts (2507.07024): one public expert and seven of domains, 4 of them active.

The sizes are those of section 4.4; the vocabulary is the one of FlexOlmo-7x7B-1T, which has 7
experts and, in its file, routes each token to all of them.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import olmoe

from moe_jax.counting import PublishedNumber

_SOURCE = "2507.07024, section 4.4"
PUBLISHED = (
    PublishedNumber("total", 37e9, 0.02, _SOURCE),
    PublishedNumber("active.embedding_and_head", 20e9, 0.03, _SOURCE),
)


def get_config() -> ConfigDict:
    config = olmoe.olmoe("flex_olmo_37b", experts=8, k=4, expert_dim=11008)
    model = config.model
    model.update(num_layers=32, width=4096, num_heads=32)
    model.norm.update(eps=1e-6, place="output")
    model.positions.base = 500000.0
    config.data.vocab_size = 100352
    return config
