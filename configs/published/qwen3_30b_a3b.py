"""Qwen3-30B-A3B (Yang et al. 2025, 2505.09388)."""

from ml_collections import ConfigDict
from moe_jax.configs import common

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 30.532e9, 0.001, "released weights"),
    PublishedNumber("total", 30.5e9, 0.002, "Qwen3 report"),
    PublishedNumber("active.embedding_and_head", 3.3e9, 0.02, "Qwen3 report"),
    PublishedNumber("active.no_input_embedding", 3.042e9, 0.001, "released weights"),
)


def get_config() -> ConfigDict:
    config = common.base("qwen3_30b_a3b")
    model = config.model
    model.update(
        num_layers=48,
        width=2048,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        mlp_dim=6144,
        gated=True,
        activation="silu",
        tie_embeddings=False,
        scale_embedding=False,
        compute_dtype="bfloat16",
        remat="full",
    )
    model.positions.base = 1e6
    model.attention.qk_norm = "head"
    model.moe.update(every=1, num_experts=128, expert_dim=768)
    model.moe.router = common.router("qwen3_moe")
    config.data.update(vocab_size=151936, seq_length=32768, batch_size=128)
    return config
