"""Expert Choice in an encoder: capacity factors, compared with top-1, top-2 and hash."""

from ml_collections import ConfigDict
from moe_jax.configs import span_corruption
from moe_jax.configs.common import router
from moe_jax.experiments.base import SPANS

from moe_jax.ablation.ablation import Ablation, Claim, Published

_FIGURE = "Expert Choice figure 4a, figure only"
_ACCURACY = "Expert Choice (2202.09368), accuracy of 100M with 64 experts"


def _base() -> ConfigDict:
    return span_corruption.get_config("switch")


def _arm(preset: str, **choices: float) -> dict:
    return {"model.encoder_moe.router": router(preset, **choices)}


ABLATION = Ablation(
    name="expert_choice_capacity",
    title="Expert Choice: capacity factors, compared with token choice",
    base=_base,
    arms={
        "choice_0.5": _arm("expert_choice", capacity_factor=0.5, eval_capacity_factor=0.5),
        "choice_1": _arm("expert_choice", capacity_factor=1.0, eval_capacity_factor=1.0),
        "choice_2": _arm("expert_choice", capacity_factor=2.0, eval_capacity_factor=2.0),
        "capped_2": _arm("expert_choice_capped", capacity_factor=2.0, experts_per_token=2),
        "capped_3": _arm("expert_choice_capped", capacity_factor=2.0, experts_per_token=3),
        "top1": _arm("switch"),
        "top2": _arm("gshard"),
        "hash": _arm("hash"),
    },
    scales=SPANS,
    published=(
        Published(
            "Expert Choice table 4 (2202.09368)",
            "100M with 64 experts, data and recipe of GLaM",
            "average accuracy in fine-tuning",
            {"choice_2": 84.0, "capped_2": 83.2, "capped_3": 84.0, "hash": 81.3},
        ),
        Published(
            "Expert Choice (2202.09368), compared with token choice",
            "100M with 64 experts, data and recipe of GLaM",
            "average accuracy in fine-tuning on 11 tasks",
            {"choice_2": 84.0, "top1": 78.4, "top2": 82.2},
        ),
    ),
    claims=(
        Claim(
            "Capacity factor 1 has a lower loss than 0.5",
            "loss",
            "choice_1",
            "choice_0.5",
            paper=_FIGURE,
        ),
        Claim(
            "Capacity factor 2 has a lower loss than 1",
            "loss",
            "choice_2",
            "choice_1",
            paper=_FIGURE,
        ),
        Claim(
            "Capacity factor 0.5 has a lower loss than top-1 token choice",
            "loss",
            "choice_0.5",
            "top1",
            paper=_FIGURE,
        ),
        Claim(
            "Capacity factor 2 has a lower loss than top-2 token choice",
            "loss",
            "choice_2",
            "top2",
            paper=f"{_ACCURACY}, 84.0 against 82.2",
        ),
        Claim(
            "A cap of 2 experts per token raises the loss",
            "loss",
            "choice_2",
            "capped_2",
            paper=f"{_ACCURACY}, 84.0 against 83.2",
        ),
        Claim(
            "A cap of 3 experts per token does not raise the loss",
            "loss",
            "capped_3",
            "choice_2",
            margin=-0.02,
            paper=f"{_ACCURACY}, 84.0 for both",
        ),
        Claim(
            "Expert Choice has a lower loss than a hash router",
            "loss",
            "choice_2",
            "hash",
            paper=f"{_ACCURACY}, 84.0 against 81.3",
        ),
    ),
    notes=(
        "The losses of all arms lie within 0.01 nats. With any router, one MoE layer in an "
        "encoder of two layers hardly changes the loss of the decoder after 1000 steps.",
        "`dropped` counts encoder and decoder together. If experts choose in the encoder, only "
        "the decoder drops tokens.",
    ),
)

get_config = ABLATION.get_config
