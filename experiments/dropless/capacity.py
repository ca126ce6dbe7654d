"""MegaBlocks: capacity factors against dropping nothing."""

from configs.common import router
from experiments.ablation import Ablation, Claim
from experiments.base import DROPLESS, SCALES, language_model

_FACTORS = {"0.5": 0.5, "1": 1.0, "1.5": 1.5, "2": 2.0}

ABLATION = Ablation(
    name="dropless_capacity",
    title="Dropless against capacity factors",
    base=language_model,
    arms={
        **{
            name: {
                "model.moe.router": router(
                    "switch", capacity_factor=factor, eval_capacity_factor=factor
                )
            }
            for name, factor in _FACTORS.items()
        },
        "dropless": DROPLESS | {"model.moe.router": router("olmoe", k=1, z_weight=0.0)},
    },
    scales=SCALES,
    claims=(
        Claim(
            "Dropless is better than factor 1",
            "loss",
            "dropless",
            "1",
            published=0.11,
            paper="MegaBlocks (2211.15841), MoE-XS: 46M active, 64 experts, Pile, 10B tokens",
        ),
        Claim("Dropless drops nothing", "dropped", "dropless", "1"),
        Claim("A larger factor drops less", "dropped", "2", "1"),
    ),
)

get_config = ABLATION.get_config
