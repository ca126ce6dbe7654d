"""flaxformer's released experts_choose_base: experts choose in the encoder, tokens in the decoder.

Expert choice is from Zhou et al. 2022 (2202.09368). The decoder has top-2 routing with raw gates.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import t5

PUBLISHED = ()


def get_config() -> ConfigDict:
    config = t5.flaxformer(
        "experts_choose_base", layers=12, width=768, heads=12, mlp_dim=2048, every=2, num_experts=64
    )
    config.model.encoder_moe.router = common.router(
        "expert_choice", capacity_factor=1.0, eval_capacity_factor=1.0
    )
    return config
