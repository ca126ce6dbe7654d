"""flaxformer's released experts_choose_small: expert choice, in the encoder only."""

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import t5

PUBLISHED = ()


def get_config() -> ConfigDict:
    config = t5.flaxformer(
        "experts_choose_small", layers=8, width=512, heads=6, mlp_dim=1024, every=2, num_experts=32
    )
    config.model.encoder_moe.router = common.router(
        "expert_choice", capacity_factor=1.0, eval_capacity_factor=1.0
    )
    return config
