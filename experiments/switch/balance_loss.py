"""Switch section 2.2: the weight of the balance loss, in powers of ten, and none."""

from moe_jax.configs.common import router
from moe_jax.experiments.base import SCALES, language_model

from moe_jax.ablation.ablation import Ablation, Claim


def _arm(weight: float) -> dict:
    return {"model.moe.router": router("switch", balance_weight=weight)}


ABLATION = Ablation(
    name="switch_balance_loss",
    title="Switch: weight of the balance loss",
    base=language_model,
    arms={
        "none": _arm(0.0),
        "1e-5": _arm(1e-5),
        "1e-4": _arm(1e-4),
        "1e-3": _arm(1e-3),
        "1e-2": _arm(1e-2),
        "1e-1": _arm(1e-1),
        "1": _arm(1.0),
    },
    scales=SCALES,
    claims=(
        Claim("1e-2 balances", "max_violation", "1e-2", "none", paper="Switch section 2.2"),
        Claim(
            "Without it load gathers on few experts (collapse)",
            "load_entropy",
            "none",
            "1e-2",
            paper="OLMoE (2409.02060): the first layer falls to 1 or 2 experts",
        ),
        Claim("and loss is worse", "loss", "1e-2", "none", paper="OLMoE, figure only"),
        Claim(
            "1e-2 is small enough not to hurt the loss",
            "loss",
            "1e-2",
            "1e-3",
            margin=-0.02,
            paper="Switch section 2.2",
        ),
        Claim("A weight of 1 hurts it (ours)", "loss", "1e-2", "1"),
    ),
)

get_config = ABLATION.get_config
