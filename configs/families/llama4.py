"""Llama 4's text models (Meta 2025, released configurations).

Every fourth layer has no rotary positions, attends to all tokens and scales its queries with their
position; other layers attend within chunks of 8192 tokens. Gates scale the inputs of the experts.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common


def llama4(name: str, experts: int, every: int) -> ConfigDict:
    """Returns a top-1 model with ``experts`` and a shared expert in every ``every``-th layer."""
    config = common.base(name)
    model = config.model
    model.update(
        num_layers=48,
        width=5120,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=16384,
        gated=True,
        activation="silu",
        tie_embeddings=False,
        scale_embedding=False,
        compute_dtype="bfloat16",
        remat="full",
    )
    model.norm.eps = 1e-5
    model.positions.update(base=5e5, interleaved=True)
    model.attention.chunk = 8192
    everything = {"temperature": 0.1, "temperature_length": 8192}
    model.attention_overrides = ({"every": 4, "rotary": False, "details": everything},)
    model.moe.shared.hidden = 8192
    model.moe.update(every=every, num_experts=experts, expert_dim=8192)
    model.moe.router = common.router("llama4")
    config.data.update(vocab_size=202048, seq_length=8192, batch_size=512)
    return config
