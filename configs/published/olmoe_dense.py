"""The dense twin of OLMoE's ablations, one layer of 8192 for 8 active experts of 1024."""

from ml_collections import ConfigDict

from configs import common

PUBLISHED = ()


def get_config() -> ConfigDict:
    config = common.base("olmoe_dense")
    model = config.model
    model.update(
        num_layers=16,
        width=2048,
        num_heads=16,
        head_dim=128,
        mlp_dim=8192,
        gated=True,
        activation="silu",
        tie_embeddings=False,
        scale_embedding=False,
        compute_dtype="bfloat16",
        remat="full",
    )
    model.norm.eps = 1e-5
    model.attention.qk_norm = "width"
    model.moe.update(every=0, num_experts=64, expert_dim=1024)
    model.moe.router = common.router("olmoe", k=8)
    config.data.update(vocab_size=50304, seq_length=4096, batch_size=1024)
    return config
