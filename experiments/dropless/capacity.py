"""MegaBlocks: dropless routing compared with capacity factors."""

from moe_jax.configs.common import router
from moe_jax.experiments.base import DROPLESS, SCALES, language_model

from moe_jax.ablation.ablation import Ablation, Claim

_PAPER = "MegaBlocks (2211.15841), MoE-XS: 46M active, 64 experts, Pile, 10B tokens"
_FACTORS = {"0.5": 0.5, "1": 1.0, "1.5": 1.5, "2": 2.0}

ABLATION = Ablation(
    name="dropless_capacity",
    title="MegaBlocks: dropless routing and capacity factors",
    base=language_model,
    arms={
        "dense": {"model.moe.every": 0},
        **{
            name: {
                "model.moe.router": router(
                    "switch",
                    capacity_factor=factor,
                    eval_capacity_factor=factor,
                    input_jitter=0.0,
                )
            }
            for name, factor in _FACTORS.items()
        },
        "dropless": DROPLESS | {"model.moe.router": router("olmoe", k=1, z_weight=0.0)},
    },
    scales=SCALES,
    claims=(
        Claim(
            "Dropless routing has a lower loss than capacity factor 1",
            "loss",
            "dropless",
            "1",
            published=0.11,
            paper=_PAPER,
        ),
        Claim(
            "Dropless routing has a lower loss than a dense model",
            "loss",
            "dropless",
            "dense",
            0,
            False,
            0.26,
            _PAPER,
        ),
        Claim(
            "Capacity factor 1 has a lower loss than a dense model",
            "loss",
            "1",
            "dense",
            0,
            False,
            0.15,
            _PAPER,
        ),
        Claim(
            "Dropless routing reaches the dense loss in fewer steps than factor 1",
            "steps_to",
            "dropless",
            "1",
            paper="MegaBlocks: in 1/1.38 of the time of the best factor",
        ),
        Claim("Dropless routing drops fewer tokens than factor 1", "dropped", "dropless", "1"),
        Claim("Capacity factor 2 drops fewer tokens than factor 1", "dropped", "2", "1"),
    ),
    threshold_arm="dense",
)

get_config = ABLATION.get_config
