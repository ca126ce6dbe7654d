"""fairseq's translation transformer with experts in every other layer (branch ``moe``).

The sizes are the base model of 1706.03762; no parameter count is published.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import fairseq

PUBLISHED = ()


def get_config() -> ConfigDict:
    name = "fairseq_transformer_moe"
    config = fairseq.translation(name, 6, 512, 8, 2048, every=2, num_experts=8)
    config.data.update(vocab_size=40000, seq_length=128, target_length=128)
    return config
