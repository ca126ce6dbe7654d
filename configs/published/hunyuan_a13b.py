"""Hunyuan-A13B (Tencent 2025): 64 experts and a shared one in every layer, 8 experts per token.

The sizes are those of tencent/Hunyuan-A13B-Instruct/config.json, as a test of an MLX loader of the
model repeats it; the page apxml.com/models/hunyuan-a13b prints the same ones.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import open_models

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 80e9, 0.01, "Hunyuan-A13B README"),
    PublishedNumber("active.embedding_and_head", 13e9, 0.03, "Hunyuan-A13B README"),
)


def get_config() -> ConfigDict:
    config = open_models.decoder("hunyuan_a13b", layers=32, width=4096, heads=(32, 8, 128))
    model = config.model
    model.update(mlp_dim=3072, tie_embeddings=True)
    model.norm.eps = 1e-5
    # NTK-aware scaling with alpha = 1000 stretches the base 10000.
    model.positions.base = 1e4 * 1000 ** (128 / 126)
    model.attention.qk_norm = "rotated"
    model.moe.update(every=1, num_experts=64, expert_dim=3072)
    model.moe.shared.hidden = 3072
    model.moe.router = common.router("mixtral", k=8, balance_weight=1e-3)
    config.data.update(vocab_size=128167, seq_length=8192, batch_size=1024)
    return config
