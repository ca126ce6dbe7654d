"""Switch section 2.2: weights of the balance loss in powers of ten, and no balance loss."""

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
        Claim(
            "A weight of 1e-2 gives a more even load than no balance loss",
            "max_violation",
            "1e-2",
            "none",
            paper="Switch section 2.2",
        ),
        Claim(
            "Without a balance loss, the load collapses to few experts",
            "load_entropy",
            "none",
            "1e-2",
            paper="OLMoE (2409.02060): the first layer collapses to 1 or 2 experts",
        ),
        Claim(
            "Without a balance loss, the loss is higher",
            "loss",
            "1e-2",
            "none",
            paper="OLMoE, figure only",
        ),
        Claim(
            "A weight of 1e-2 does not raise the loss, compared with 1e-3",
            "loss",
            "1e-2",
            "1e-3",
            margin=-0.02,
            paper="Switch section 2.2",
        ),
        Claim("A weight of 1 raises the loss (ours)", "loss", "1e-2", "1"),
    ),
)

get_config = ABLATION.get_config
