"""ST-MoE-32B with 64 experts (Zoph et al. 2022, 2202.08906, table 11).

The table prints 27 layers; 24 layers and a dense sub-layer after each MoE layer give its 269B.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import t5

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 269e9, 0.001, "ST-MoE table 11"),
    PublishedNumber("flops_per_sequence.kaplan", 20.2e12, 0.006, "ST-MoE table 11"),
)


def get_config() -> ConfigDict:
    name = "st_moe_32b"
    base = t5.t5(
        name,
        layers=24,
        width=5120,
        heads=64,
        head_dim=128,
        mlp_dim=20480,
        activation="gelu",
        gated=True,
        tie_embeddings=False,
    )
    router = common.router("st_moe", capacity_factor=1.25, eval_capacity_factor=2.0, z_weight=0.001)
    return t5.sparse(base, router, every=4, num_experts=64, group_size=4096, extra_dense="after")
