"""DeepSeekMoE's comparison of routers at 2B parameters (Dai et al. 2024, 2401.06066, table 1)."""

from ml_collections import ConfigDict
from moe_jax.configs import common


def two_billion(name: str, router: ConfigDict | None, **moe) -> ConfigDict:
    """Returns a model of 9 layers; all experts of a layer together are as large as 16 FFNs."""
    config = common.base(name)
    model = config.model
    model.update(
        num_layers=9,
        width=1280,
        num_heads=10,
        head_dim=128,
        mlp_dim=5120,
        activation="silu",
        tie_embeddings=False,
        scale_embedding=False,
        compute_dtype="bfloat16",
    )
    model.moe.update(every=1 if router else 0, **moe)
    model.moe.router = router or common.router("switch")
    config.optimizer.rule.update(b1=0.9, b2=0.95, weight_decay=0.1)
    config.optimizer.update(learning_rate=1.08e-3, warmup_steps=2000, clip_norm=1.0)
    config.data.update(vocab_size=8192, seq_length=2048, batch_size=2048)
    config.training.steps = 25_000
    return config
