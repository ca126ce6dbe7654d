"""OLMoE's ablation with 32 experts of 2048, top-4 (2409.02060, section 4; public as fine)."""

from ml_collections import ConfigDict

from configs import common

PUBLISHED = ()


def get_config() -> ConfigDict:
    config = common.base("olmoe_32e_k4")
    model = config.model
    model.update(
        num_layers=16,
        width=2048,
        num_heads=16,
        head_dim=128,
        mlp_dim=2048,
        gated=True,
        activation="silu",
        tie_embeddings=False,
        scale_embedding=False,
        compute_dtype="bfloat16",
        remat="full",
    )
    model.norm.eps = 1e-5
    model.attention.qk_norm = "width"
    model.moe.update(every=1, num_experts=32, expert_dim=2048)
    model.moe.router = common.router("olmoe", k=4)
    config.data.update(vocab_size=50304, seq_length=4096, batch_size=1024)
    return config
