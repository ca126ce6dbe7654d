"""flaxformer's released experts_choose_small: experts choose in the encoder alone."""

from ml_collections import ConfigDict

from configs import common
from configs.families import t5

PUBLISHED = ()


def get_config() -> ConfigDict:
    name = "experts_choose_small"
    config = t5.t5(
        name,
        layers=8,
        width=512,
        heads=6,
        mlp_dim=1024,
        activation="gelu",
        gated=True,
        tie_embeddings=False,
    )
    top2 = common.router("top2_mtf", second="all")
    t5.sparse(config, top2, every=2, num_experts=32, group_size=4096)
    config.model.encoder_moe.router = common.router(
        "expert_choice", capacity_factor=1.0, eval_capacity_factor=1.0
    )
    return config
