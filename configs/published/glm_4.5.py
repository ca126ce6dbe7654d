"""GLM-4.5 (2508.06471): rotation of half a head, norms of queries and keys, a lookahead.

The sizes are those of zai-org/GLM-4.5, as the page of GLM 4.5 in the documentation of
Megatron-Bridge and scripts/models/glm4.5-355B-A32B.sh of slime state them. The epsilon of the norms
is the default of Glm4MoeConfig in transformers.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import open_models

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 355e9, 0.01, "zai-org/GLM-4.5 README"),
    PublishedNumber("active.no_input_embedding", 32e9, 0.04, "zai-org/GLM-4.5 README"),
)


def get_config() -> ConfigDict:
    config = open_models.decoder("glm_4.5", layers=92, width=5120, heads=(96, 8, 128))
    model = config.model
    model.mlp_dim = 12288
    model.lookahead = 1
    model.norm.eps = 1e-5
    model.positions.update(base=1e6, share=0.5)
    model.attention.update(qkv_bias=True, qk_norm="head")
    model.moe.update(layers=tuple(range(3, 92)), num_experts=160, expert_dim=1536)
    model.moe.shared.hidden = 1536
    model.moe.router = common.router("deepseek_v3", groups=1, keep_groups=1)
    config.data.update(vocab_size=151552, seq_length=4096, batch_size=16384)
    return config
