"""Expert Choice figure 2: steps until Expert Choice reaches the final loss of top-2."""

from ml_collections import ConfigDict
from moe_jax.configs import span_corruption
from moe_jax.configs.common import router
from moe_jax.experiments.base import SPANS

from moe_jax.ablation.ablation import Ablation, Claim


def _base() -> ConfigDict:
    return span_corruption.get_config("switch")


def _arm(preset: str, factor: float) -> dict:
    both = router(preset, capacity_factor=factor, eval_capacity_factor=factor)
    return {"model.encoder_moe.router": both}


ABLATION = Ablation(
    name="expert_choice_convergence",
    title="Expert Choice: speed of convergence against top-2",
    base=_base,
    arms={"choice_2": _arm("expert_choice", 2.0), "top2": _arm("gshard", 2.0)},
    scales=SPANS,
    claims=(
        Claim(
            "Expert Choice has a lower loss than top-2 at equal steps (2202.09368, figure 2a)",
            "loss",
            "choice_2",
            "top2",
        ),
        Claim(
            "A step of top-2 takes longer than a step of Expert Choice",
            "tokens_per_second",
            "top2",
            "choice_2",
            paper="Expert Choice (2202.09368): by 20 %",
        ),
        Claim(
            "Expert Choice reaches the last loss of top-2 in fewer steps",
            "steps_to",
            "choice_2",
            "top2",
            paper="Expert Choice figure 2a: in less than half of them",
        ),
    ),
    notes=(
        "One MoE layer in an encoder of two layers hardly changes the loss after 1000 steps: "
        "the losses of all arms of `expert_choice_capacity` lie within 0.01 nats.",
    ),
    threshold_arm="top2",
)

get_config = ABLATION.get_config
