"""dots.llm1 (rednote 2025, 2506.05767): norms of queries and keys, 6 of 128 experts, 2 shared.

Layers, heads and experts are those of the README of rednote-hilab/dots.llm1.inst. The other sizes
are those of mlx-community/dots.llm1.inst-mixed-4-6bit/config.json, as a test of a loader of
the model repeats it.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import open_models

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 142e9, 0.01, "2506.05767, abstract"),
    PublishedNumber("active.embedding_and_head", 14e9, 0.03, "2506.05767, abstract"),
)


def get_config() -> ConfigDict:
    config = open_models.decoder("dots_llm1", layers=62, width=4096, heads=(32, 32, 128))
    model = config.model
    model.mlp_dim = 10944
    model.norm.eps = 1e-5
    model.positions.base = 1e7
    model.attention.qk_norm = "head"
    model.moe.update(layers=tuple(range(1, 62)), num_experts=128, expert_dim=1408)
    model.moe.shared.hidden = 2 * 1408
    model.moe.router = common.router("deepseek_v3", k=6, groups=1, keep_groups=1)
    config.data.update(vocab_size=152064, seq_length=8192, batch_size=8192)
    return config
