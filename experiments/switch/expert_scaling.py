"""Switch section 3.1: number of experts at equal FLOPs per token and equal steps."""

from moe_jax.experiments.base import REGISTERED, beats_zlib, gates_from_one, saturated_model

from moe_jax.ablation.ablation import Ablation, Claim, Published
from moe_jax.ablation.overlay import FittedCoefficient, Overlay
from moe_jax.counting.fits import expert_slope
from moe_jax.counting.laws import S_BASE

# Pre-training losses of table 7 by number of experts, which follows from the printed parameters
# (1: T5-Base of 223M).
_PUBLISHED = {1: -1.636, 16: -1.505, 32: -1.474, 64: -1.444, 128: -1.432, 256: -1.427}
_ARMS = {"dense": 1, **{f"e{n}": n for n in (2, 4, 8, 16, 32, 64)}}
_FIGURE = "Switch appendix D, figure only"
# Smallest model, in parameters, on which the law was fitted.
_SMALLEST = 15e6

ABLATION = Ablation(
    name="switch_expert_scaling",
    title="Switch: scaling the number of experts on a step basis",
    base=saturated_model,
    arms={
        "dense": {"model.moe.every": 0},
        **{arm: {"model.moe.num_experts": n} for arm, n in _ARMS.items() if n > 1},
        "e16_from_1": {"model.moe.router": gates_from_one},
    },
    scales=REGISTERED,
    seeds=12,
    registered="75f60839dd4d359ccd97367aad46b6da77fb9f69",
    published=(
        Published(
            "Switch table 7 (2101.03961)",
            "T5-Base, C4, pre-trained",
            "negative log perplexity in nats",
            {arm: _PUBLISHED[n] for arm, n in _ARMS.items() if n in _PUBLISHED},
            measures="loss",
            negated=True,
        ),
    ),
    claims=(
        Claim(
            "2 experts have a lower loss than a dense model", "loss", "e2", "dense", paper=_FIGURE
        ),
        Claim(
            "8 experts have a lower loss than a dense model", "loss", "e8", "dense", paper=_FIGURE
        ),
        Claim("16 experts have a lower loss than a dense model", "loss", "e16", "dense"),
        Claim("16 experts have a lower loss than 4", "loss", "e16", "e4", paper="Switch figure 4"),
        Claim("64 experts have a lower loss than 16", "loss", "e64", "e16"),
    ),
    gates=(beats_zlib(),),
    overlay=Overlay(
        label="experts",
        places=_ARMS,
        series={"Switch table 7": {n: -value for n, value in _PUBLISHED.items()}},
        laws={
            "Clark et al., S-BASE at 15M": lambda experts: float(S_BASE.loss(_SMALLEST, experts)),
        },
        coefficients=(
            FittedCoefficient(
                "slope of log10 loss in log10 effective experts",
                "Clark et al. table 3 (2202.01169), S-BASE at 15M",
                float(S_BASE.expert_slope(_SMALLEST)),
                expert_slope,
            ),
        ),
    ),
)

get_config = ABLATION.get_config
