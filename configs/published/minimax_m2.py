"""MiniMax-M2 (MiniMaxAI 2025): sigmoid routing to 8 of 256 experts.

Half of each head is rotated. The sizes are the defaults of MiniMaxM2Config in transformers; the
rotated width of 64 is the ``rotary_dim`` that NeMo Automodel tests for the released checkpoint. The
modules that predict further tokens are not built.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import open_models

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 230e9, 0.01, "transformers docs, minimax_m2"),
    PublishedNumber("active.no_input_embedding", 10e9, 0.05, "transformers docs, minimax_m2"),
)


def get_config() -> ConfigDict:
    config = open_models.decoder("minimax_m2", layers=62, width=3072, heads=(48, 8, 128))
    model = config.model
    model.mlp_dim = 1536
    model.positions.update(base=5e6, share=0.5)
    model.attention.qk_norm = "width"
    model.moe.update(every=1, num_experts=256, expert_dim=1536)
    model.moe.router = common.router("deepseek_v3", groups=1, keep_groups=1, scale=1.0)
    config.data.update(vocab_size=200064, seq_length=4096, batch_size=4096)
    return config
