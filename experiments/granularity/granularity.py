"""Krajewski et al. 2024: experts split into G smaller experts, with G times as many per token."""

from collections.abc import Callable

from moe_jax.configs.common import router
from moe_jax.experiments.base import DROPLESS, SCALES, language_model

from moe_jax.ablation.ablation import Ablation, Claim, Published
from moe_jax.ablation.overlay import FittedCoefficient, Overlay
from moe_jax.counting.fits import granularity_exponent
from moe_jax.counting.laws import MOE, blocks_of, total_parameters

_PARTS = (1, 2, 4, 8)


def _arm(parts: int) -> dict:
    return DROPLESS | {
        "model.moe.num_experts": 8 * parts,
        "model.moe.expert_dim": lambda config: config.model.mlp_dim // parts,
        # The balance loss is a sum over choices.
        "model.moe.router": router("qwen3_moe", k=parts, balance_weight=1e-2 / parts, over="span"),
    }


_RAW = {"model.moe.router": router("olmoe", k=1, balance_weight=1e-2, z_weight=0.0)}


def _law(active: float, tokens: float) -> Callable[[float], float]:
    total = total_parameters(blocks_of(active))
    return lambda parts: float(MOE.loss(total, tokens, parts))


ABLATION = Ablation(
    name="granularity",
    title="Granularity of experts",
    base=language_model,
    arms={**{f"g{parts}": _arm(parts) for parts in _PARTS}, "g1_raw": _arm(1) | _RAW},
    scales=SCALES,
    published=(
        Published(
            "Krajewski et al. 2024 (2402.07871), their law",
            "64 experts at G = 1, 25M active parameters, 66B tokens",
            "loss in nats",
            {"g1": 3.109, "g2": 3.045, "g4": 3.003, "g8": 2.974},
            measures="loss",
        ),
    ),
    claims=(
        Claim("G = 2 has a lower loss than G = 1", "loss", "g2", "g1"),
        Claim("G = 8 has a lower loss than G = 1", "loss", "g8", "g1"),
        Claim("G = 8 has a lower loss than G = 2", "loss", "g8", "g2"),
        Claim("G = 2 has a lower loss than G = 1 with a raw gate (ours)", "loss", "g2", "g1_raw"),
        Claim("G = 8 has a lower loss than G = 1 with a raw gate (ours)", "loss", "g8", "g1_raw"),
    ),
    notes=(
        "The loss does not fall beyond G = 2 here. At G = 8 an expert has a hidden width of "
        "16; the law was fitted on models with millions of parameters.",
        "Gates are divided by their sum. With one expert per token the gate is therefore "
        "always 1, and only the balance loss trains the router of `g1`. The arm `g1_raw` has "
        "the raw gate of Switch.",
    ),
    overlay=Overlay(
        label="granularity",
        places={f"g{parts}": parts for parts in _PARTS},
        laws={
            "Krajewski et al., 64 x 3M, 16B tokens": _law(3e6, 16e9),
            "64 x 25M, 66B tokens": _law(25e6, 66e9),
        },
        coefficients=(
            FittedCoefficient(
                "exponent of granularity (10: the loss does not fall after the first step)",
                "Krajewski et al. table 1 (2402.07871)",
                MOE.gamma,
                granularity_exponent,
            ),
        ),
    ),
)

get_config = ABLATION.get_config
