"""flaxformer's released experts_choose_base: experts choose in the encoder, tokens in the decoder.

Expert choice is Zhou et al. 2022 (2202.09368); the decoder takes the top 2 with all second experts
kept.
"""

from ml_collections import ConfigDict

from configs import common
from configs.families import t5

PUBLISHED = ()


def get_config() -> ConfigDict:
    name = "experts_choose_base"
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
    t5.sparse(config, top2, every=2, num_experts=64, group_size=4096)
    config.model.encoder_moe.router = common.router(
        "expert_choice", capacity_factor=1.0, eval_capacity_factor=1.0
    )
    return config
