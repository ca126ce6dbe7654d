"""gpt-oss (OpenAI 2025, model card): biases, attention sinks, and windows of 128 tokens."""

from ml_collections import ConfigDict
from moe_jax.configs import common


def gpt_oss(name: str, layers: int, experts: int) -> ConfigDict:
    """Returns a model with ``experts`` in every layer and top-4 routing."""
    config = common.base(name)
    model = config.model
    model.update(
        num_layers=layers,
        width=2880,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        mlp_dim=2880,
        mlp_bias=True,
        mlp_limit=7.0,
        mlp_up_offset=1.0,
        gated=True,
        activation="quick_gelu",
        tie_embeddings=False,
        scale_embedding=False,
        compute_dtype="bfloat16",
        remat="full",
    )
    model.norm.eps = 1e-5
    model.positions.base = 1.5e5
    model.positions.scaling = common.part(
        "YarnScaling", factor=32.0, original_length=4096, truncate=False
    )
    details = {"qkv_bias": True, "output_bias": True, "sinks": True}
    model.attention.update(details, window=128)
    model.attention_overrides = ({"every": 2, "details": details},)
    model.moe.update(every=1, num_experts=experts, expert_dim=2880)
    model.moe.router = common.router("gpt_oss")
    config.data.update(vocab_size=201088, seq_length=4096, batch_size=512)
    return config
