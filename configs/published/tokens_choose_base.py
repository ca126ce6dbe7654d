"""flaxformer's released tokens_choose_base: top-2 in both stacks, three sparse layers in each."""

from ml_collections import ConfigDict

from configs import common
from configs.families import t5

PUBLISHED = ()


def get_config() -> ConfigDict:
    name = "tokens_choose_base"
    config = t5.t5(
        name,
        layers=12,
        width=768,
        heads=12,
        mlp_dim=2048,
        activation="gelu",
        gated=True,
        tie_embeddings=False,
    )
    top2 = common.router("top2_mtf", second="all")
    t5.sparse(config, top2, every=4, num_experts=64, group_size=4096)
    config.model.encoder_moe.router = common.router("top2_mtf", second="all")
    return config
