"""MegaBlocks' language models (Gale et al. 2022, 2211.15841, table 1)."""

from ml_collections import ConfigDict
from moe_jax.configs import common


def dropless(name: str, layers: int, width: int) -> ConfigDict:
    """Returns a model with 64 experts in every layer and dropless top-1 routing."""
    config = common.base(name)
    model = config.model
    model.update(
        num_layers=layers,
        width=width,
        num_heads=width // 64,
        head_dim=64,
        mlp_dim=4 * width,
        activation="gelu",
        scale_embedding=False,
        compute_dtype="bfloat16",
    )
    model.norm.update(kind="layer", eps=1e-5, bias=True)
    model.positions = common.part("Learned", length=1024)
    model.moe.update(every=1, num_experts=64, expert_dim=4 * width)
    model.moe.router = common.router("qwen2_moe", k=1, balance_weight=0.01)
    config.data.update(vocab_size=51200, seq_length=1024, batch_size=512)
    config.training.steps = 20_000
    return config
