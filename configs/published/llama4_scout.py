"""Llama 4 Scout, the text model (Meta 2025, released configuration).

Every fourth layer rotates nothing, sees everything and heats its queries; the others see chunks of
8192 tokens. A gate scales what goes into its expert.
"""

from ml_collections import ConfigDict

from configs import common
from moe_jax.planning import Claim

PUBLISHED = (
    Claim("total", 107.77e9, 0.001, "released weights, text"),
    Claim("total", 109e9, 0.012, "model card, with 0.81B of the vision tower"),
    Claim("active.embedding_and_head", 17.17e9, 0.001, "released weights"),
)


def get_config() -> ConfigDict:
    config = common.base("llama4_scout")
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
    model.positions.scaling = common.part("Llama3Scaling", factor=8.0)
    model.attention.update(qk_norm="unit", chunk=8192)
    everything = {"temperature": 0.1, "temperature_length": 8192}
    model.attention_overrides = ({"every": 4, "rotary": False, "details": everything},)
    model.moe.shared.hidden = 8192
    model.moe.update(every=1, num_experts=16, expert_dim=8192)
    model.moe.router = common.router("llama4")
    config.data.update(vocab_size=202048, seq_length=8192, batch_size=512)
    return config
