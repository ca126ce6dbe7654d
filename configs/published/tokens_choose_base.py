"""flaxformer's released tokens_choose_base: top-2 in both stacks, three sparse layers in each."""

from ml_collections import ConfigDict
from moe_jax.configs.families import t5

PUBLISHED = ()


def get_config() -> ConfigDict:
    return t5.flaxformer(
        "tokens_choose_base",
        layers=12,
        width=768,
        heads=12,
        mlp_dim=2048,
        every=4,
        num_experts=64,
    )
