"""Qwen1.5-MoE-A2.7B (Qwen team 2024): a gated shared expert, biased projections."""

from ml_collections import ConfigDict
from moe_jax.configs import common

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 14.316e9, 0.001, "released weights"),
    PublishedNumber("active.embedding_and_head", 2.689e9, 0.001, "released weights"),
    PublishedNumber("total", 14.3e9, 0.002, "model card"),
    PublishedNumber("active.embedding_and_head", 2.7e9, 0.005, "model card"),
)


def get_config() -> ConfigDict:
    config = common.base("qwen1.5_moe_a2.7b")
    model = config.model
    model.update(
        num_layers=24,
        width=2048,
        num_heads=16,
        head_dim=128,
        mlp_dim=5632,
        gated=True,
        activation="silu",
        tie_embeddings=False,
        scale_embedding=False,
        compute_dtype="bfloat16",
        remat="full",
    )
    model.positions.base = 1e6
    model.attention.qkv_bias = True
    model.moe.shared.update(hidden=5632, mix="sigmoid")
    model.moe.update(every=1, num_experts=60, expert_dim=1408)
    model.moe.router = common.router("qwen2_moe")
    config.data.update(vocab_size=151936, seq_length=8192, batch_size=512)
    return config
