"""OLMoE's ablation with 31 experts of 2048, top-3, and a shared one (2409.02060, section 4.1.3)."""

from ml_collections import ConfigDict

from configs import common

PUBLISHED = ()


def get_config() -> ConfigDict:
    config = common.base("olmoe_32e_shared")
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
    model.moe.shared.hidden = 2048
    model.moe.update(every=1, num_experts=31, expert_dim=2048)
    model.moe.router = common.router("olmoe", k=3)
    config.data.update(vocab_size=50304, seq_length=4096, batch_size=1024)
    return config
