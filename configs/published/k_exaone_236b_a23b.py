"""K-EXAONE-236B-A23B (LG AI Research 2026): windows of 128 tokens in three of four layers.

Layers without a window have no rotary positions. The lookahead module is not built. The sizes are
those of the section "Model Configuration of K-EXAONE" in the documentation of transformers
(exaone_moe). The width of the dense layer, the base, the norms and the router are those of
tests/unittest/_torch/modeling/test_modeling_exaone_moe.py of TensorRT-LLM.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import open_models

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 236e9, 0.01, "transformers docs, exaone_moe"),
    PublishedNumber("active.no_input_embedding", 23e9, 0.03, "transformers docs, exaone_moe"),
)


def get_config() -> ConfigDict:
    config = open_models.decoder("k_exaone_236b_a23b", layers=48, width=6144, heads=(64, 8, 128))
    model = config.model
    model.mlp_dim = 18432
    model.norm.eps = 1e-5
    model.positions.base = 1e6
    model.attention.update(qk_norm="head", window=128)
    details = {"qk_norm": "head"}
    model.attention_overrides = ({"every": 4, "rotary": False, "details": details},)
    model.moe.update(layers=tuple(range(1, 48)), num_experts=128, expert_dim=2048)
    model.moe.shared.hidden = 2048
    model.moe.router = common.router("deepseek_v3", groups=1, keep_groups=1)
    config.data.update(vocab_size=153600, seq_length=8192, batch_size=1024)
    return config
