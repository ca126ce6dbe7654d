"""DBRX (Databricks 2024, released configuration): projections clipped to 8, norms without bias."""

from ml_collections import ConfigDict
from moe_jax.configs import common

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 132e9, 0.004, "DBRX release"),
    PublishedNumber("active.embedding_and_head", 36e9, 0.015, "DBRX release"),
    PublishedNumber("total", 131.60e9, 0.001, "released weights"),
    PublishedNumber("active.embedding_and_head", 36.47e9, 0.001, "released weights"),
)


def get_config() -> ConfigDict:
    config = common.base("dbrx")
    model = config.model
    model.update(
        num_layers=40,
        width=6144,
        num_heads=48,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=10752,
        gated=True,
        activation="silu",
        tie_embeddings=False,
        scale_embedding=False,
        compute_dtype="bfloat16",
        remat="full",
    )
    model.norm.update(kind="layer", eps=1e-5)
    model.positions.base = 5e5
    model.attention.clip = 8.0
    model.moe.update(every=1, num_experts=16, expert_dim=10752)
    model.moe.router = common.router("dbrx")
    config.data.update(vocab_size=100352, seq_length=32768, batch_size=128)
    return config
