"""ST-MoE-Base, flaxformer's released configuration (Zoph et al. 2022, 2202.08906).

Three of twelve layers in each stack are sparse, each with a dense sub-layer after it.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import t5

PUBLISHED = ()


def get_config() -> ConfigDict:
    name = "st_moe_base"
    base = t5.t5(
        name,
        layers=12,
        width=768,
        heads=12,
        head_dim=64,
        mlp_dim=2048,
        activation="gelu",
        gated=True,
        tie_embeddings=False,
    )
    router = common.router(
        "st_moe", capacity_factor=1.25, eval_capacity_factor=2.0, z_weight=0.0001
    )
    return t5.sparse(base, router, every=4, num_experts=16, group_size=4096, extra_dense="after")
