"""OLMoE-1B-7B (Muennighoff et al. 2024, 2409.02060)."""

from ml_collections import ConfigDict

from configs import common
from moe_jax.planning import Claim

PUBLISHED = (
    Claim("total", 6.919e9, 0.001, "released weights"),
    Claim("active.embedding_and_head", 1.282e9, 0.001, "released weights"),
    Claim("total", 6.9e9, 0.005, "OLMoE table 1"),
    Claim("active.embedding_and_head", 1.3e9, 0.02, "OLMoE table 1"),
)


def get_config() -> ConfigDict:
    config = common.base("olmoe_1b_7b")
    model = config.model
    model.update(
        num_layers=16,
        width=2048,
        num_heads=16,
        head_dim=128,
        mlp_dim=1024,
        gated=True,
        activation="silu",
        tie_embeddings=False,
        scale_embedding=False,
        compute_dtype="bfloat16",
        remat="full",
    )
    model.norm.eps = 1e-5
    model.attention.qk_norm = "width"
    model.moe.update(every=1, num_experts=64, expert_dim=1024)
    model.moe.router = common.router("olmoe", k=8)
    config.data.update(vocab_size=50304, seq_length=4096, batch_size=1024)
    return config
