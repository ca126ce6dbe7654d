"""ST-MoE: capacity in training, and who is dropped where it is short."""

from configs.common import router
from experiments.ablation import Ablation, Claim, Published
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
    published=(
        Published(
            "ST-MoE table 8 (2202.08906), top-2",
            "FLOPs of T5-Large, 32 experts, C4, 100k steps",
            "negative log perplexity in nats at the capacity of training",
            {
                "choice_0.75": -1.424,
                "choice_1.0": -1.392,
                "choice_1.25": -1.375,
                "choice_2.0": -1.360,
            },
            measures="loss",
            negated=True,
        ),
    ),
    claims=(
        Claim("1.0 is better than 0.75", "loss", "choice_1.0", "choice_0.75"),
        Claim("2.0 is better than 1.0", "loss", "choice_2.0", "choice_1.0"),
        Claim(
            "The surest tokens first help at 0.75",
            "loss",
            "score_0.75",
            "choice_0.75",
            published=0.019,
            paper="ST-MoE table 8, of top-1",
        ),
    ),
)

get_config = ABLATION.get_config
