"""DeepSeekMoE-16B (Dai et al. 2024, 2401.06066): 64 small experts and 2 shared ones."""

from ml_collections import ConfigDict
from moe_jax.configs import common

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 16.376e9, 0.001, "released weights"),
    PublishedNumber("active.embedding_and_head", 2.829e9, 0.001, "released weights"),
    PublishedNumber("total", 16.4e9, 0.002, "DeepSeekMoE table 5"),
    PublishedNumber("active.embedding_and_head", 2.8e9, 0.015, "DeepSeekMoE table 5"),
)


def get_config() -> ConfigDict:
    config = common.base("deepseek_moe_16b")
    model = config.model
    model.update(
        num_layers=28,
        width=2048,
        num_heads=16,
        head_dim=128,
        mlp_dim=10944,
        gated=True,
        activation="silu",
        tie_embeddings=False,
        scale_embedding=False,
        compute_dtype="bfloat16",
        remat="full",
    )
    model.moe.shared.hidden = 2 * 1408
    model.moe.update(layers=tuple(range(1, 28)), num_experts=64, expert_dim=1408)
    model.moe.router = common.router("deepseek_moe")
    config.data.update(vocab_size=102400, seq_length=4096, batch_size=4608)
    return config
