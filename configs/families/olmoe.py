"""OLMoE and its ablations (Muennighoff et al. 2024, 2409.02060), 8192 active hidden units."""

from ml_collections import ConfigDict
from moe_jax.configs import common


def olmoe(name: str, experts: int, k: int, expert_dim: int) -> ConfigDict:
    """Returns a model with ``experts`` in every layer; a token chooses ``k`` of them."""
    config = common.base(name)
    model = config.model
    model.update(
        num_layers=16,
        width=2048,
        num_heads=16,
        head_dim=128,
        mlp_dim=expert_dim,
        gated=True,
        activation="silu",
        tie_embeddings=False,
        scale_embedding=False,
        compute_dtype="bfloat16",
        remat="full",
    )
    model.norm.eps = 1e-5
    model.attention.qk_norm = "width"
    model.moe.update(every=1, num_experts=experts, expert_dim=expert_dim)
    model.moe.router = common.router("olmoe", k=k)
    config.data.update(vocab_size=50304, seq_length=4096, batch_size=1024)
    return config


def dense(name: str) -> ConfigDict:
    """Returns the dense model, whose hidden width is the sum of a token's 8 expert widths."""
    config = olmoe(name, experts=64, k=8, expert_dim=1024)
    config.model.mlp_dim = 8192
    config.model.moe.every = 0
    return config
