"""Trinity Mini 26B-A3B (Arcee AI 2025, 2602.17004): three of four layers see 2,048 tokens.

The sizes are those of the MLX port of the model (AfMoEConfiguration) and, for the width of a head,
of AfmoeConfig in transformers 5.24. The file of the release was not read, so the window and the
scale of the gates are not verified; neither changes a count.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import open_models

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 26e9, 0.02, "2602.17004, abstract"),
    PublishedNumber("active.no_input_embedding", 3e9, 0.05, "2602.17004, abstract"),
)


def get_config() -> ConfigDict:
    config = open_models.decoder("trinity_mini", layers=32, width=2048, heads=(32, 4, 128))
    model = config.model
    model.mlp_dim = 6144
    model.scale_embedding = True
    model.norm.update(eps=1e-5, place="both")
    details = {"qk_norm": "head", "output_gate": True}
    model.attention.update(window=2048, **details)
    model.attention_overrides = ({"every": 4, "rotary": False, "details": details},)
    model.moe.update(layers=tuple(range(2, 32)), num_experts=128, expert_dim=1024)
    model.moe.shared.hidden = 1024
    model.moe.router = common.router("deepseek_v3", k=8, groups=1, keep_groups=1, scale=2.826)
    config.data.update(vocab_size=200192, seq_length=4096, batch_size=1024)
    return config
