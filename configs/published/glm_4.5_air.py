"""GLM-4.5-Air (2508.06471): rotation of half a head, biases, a lookahead.

The sizes are those of zai-org/GLM-4.5-Air: the defaults of Glm4MoeConfig in transformers, and the
page of GLM 4.5 in the documentation of Megatron-Bridge. The released config.json sets the biases.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import open_models

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 106e9, 0.01, "zai-org/GLM-4.5 README"),
    PublishedNumber("active.no_input_embedding", 12e9, 0.07, "zai-org/GLM-4.5 README"),
)


def get_config() -> ConfigDict:
    config = open_models.decoder("glm_4.5_air", layers=46, width=4096, heads=(96, 8, 128))
    model = config.model
    model.mlp_dim = 10944
    model.lookahead = 1
    model.norm.eps = 1e-5
    model.positions.update(base=1e6, share=0.5)
    model.attention.qkv_bias = True
    model.moe.update(layers=tuple(range(1, 46)), num_experts=128, expert_dim=1408)
    model.moe.shared.hidden = 1408
    model.moe.router = common.router("deepseek_v3", groups=1, keep_groups=1, scale=1.0)
    config.data.update(vocab_size=151552, seq_length=4096, batch_size=16384)
    return config
