"""ST-MoE: capacity in training, and who is dropped where it is short."""

from configs.common import router
from experiments.ablation import Ablation, Claim
from experiments.base import SCALES, language_model


def _arm(factor: float, priority: str) -> dict:
    return {
        "model.moe.router": router(
            "st_moe", capacity_factor=factor, eval_capacity_factor=factor, priority=priority
        )
    }


ABLATION = Ablation(
    name="st_moe_capacity",
    title="ST-MoE: capacity factor and batch-prioritised routing",
    base=language_model,
    arms={
        **{f"choice_{f}": _arm(f, "choice") for f in (0.75, 1.0, 1.25, 2.0)},
        **{f"score_{f}": _arm(f, "score") for f in (0.75, 1.0, 1.25)},
    },
    scales=SCALES,
    claims=(
        Claim("1.0 is better than 0.75 (.032)", "loss", "choice_1.0", "choice_0.75"),
        Claim("2.0 is better than 1.0 (.032)", "loss", "choice_2.0", "choice_1.0"),
        Claim("The surest tokens first help at 0.75 (.019)", "loss", "score_0.75", "choice_0.75"),
    ),
)

get_config = ABLATION.get_config
