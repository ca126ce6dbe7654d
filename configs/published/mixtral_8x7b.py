"""Mixtral 8x7B (Jiang et al. 2024, 2401.04088)."""

from ml_collections import ConfigDict
from moe_jax.configs import common

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 46.703e9, 0.001, "released weights"),
    PublishedNumber("active.embedding_and_head", 12.88e9, 0.001, "released weights"),
    PublishedNumber("total", 46.7e9, 0.001, "Mixtral section 1"),
    PublishedNumber("active.embedding_and_head", 12.9e9, 0.002, "Mixtral section 1"),
)


def get_config() -> ConfigDict:
    config = common.base("mixtral_8x7b")
    model = config.model
    model.update(
        num_layers=32,
        width=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=14336,
        gated=True,
        activation="silu",
        tie_embeddings=False,
        scale_embedding=False,
        compute_dtype="bfloat16",
        remat="full",
    )
    model.norm.eps = 1e-5
    model.positions.base = 1e6
    model.moe.update(every=1, num_experts=8, expert_dim=14336)
    model.moe.router = common.router("mixtral")
    config.data.update(vocab_size=32000, seq_length=32768, batch_size=128)
    return config
