"""Switch appendix A: experts for queries, keys and values, with or without feed-forward experts.

The published runs with experts in attention diverge in bfloat16. The router is in float32 here, as
everywhere in the paper.
"""

from moe_jax.configs.common import router
from moe_jax.experiments.base import SCALES, gates_from_one, language_model

from moe_jax.ablation.ablation import Ablation, Claim, Published

_FEED_FORWARD = {"model.moe.every": 2}
_NO_FEED_FORWARD = {"model.moe.every": 0}
# As many experts, groups and slots as the feed-forward layers have.
_ATTENTION = {
    "model.attention_experts.every": 2,
    "model.attention_experts.num_experts": lambda config: config.model.moe.num_experts,
    "model.attention_experts.group_size": lambda config: config.model.moe.group_size,
    "model.attention_experts.transport": "gather",
    "model.attention_experts.router": router("switch"),
}
_PLACES = {
    "dense": _NO_FEED_FORWARD,
    "feed_forward": _FEED_FORWARD,
    "attention": _NO_FEED_FORWARD | _ATTENTION,
    "both": _FEED_FORWARD | _ATTENTION,
}
_FOUR_TIMES = {"training.steps": lambda config: 4 * config.training.steps}


def _in(place: str, dtype: str) -> dict:
    # A function, because scales set the data type too.
    return _PLACES[place] | {"model.compute_dtype": lambda _: dtype}


ABLATION = Ablation(
    name="switch_attention_experts",
    title="Switch appendix A: experts in attention",
    base=language_model,
    arms={
        f"{place}_{dtype}": _in(place, dtype)
        for dtype in ("float32", "bfloat16")
        for place in _PLACES
    }
    | {f"{place}_x4": _in(place, "float32") | _FOUR_TIMES for place in ("dense", "attention")}
    | {
        "feed_forward_from_1": _in("feed_forward", "float32")
        | {"model.moe.router": gates_from_one},
        "attention_from_1": _in("attention", "float32")
        | {"model.attention_experts.router": gates_from_one},
        "both_from_1": _in("both", "float32")
        | {"model.moe.router": gates_from_one, "model.attention_experts.router": gates_from_one},
    },
    scales=SCALES,
    published=(
        Published(
            "Switch table 10 (2101.03961), where experts in attention diverge in bfloat16",
            "T5-Base with 32 experts, C4, 100k steps",
            "negative log perplexity in nats",
            {"feed_forward_float32": -1.548, "attention_float32": -1.524, "both_float32": -1.513},
            measures="loss",
            negated=True,
        ),
        Published(
            "Switch table 10 (2101.03961)",
            "the same",
            "examples per second",
            {"feed_forward_float32": 1480, "attention_float32": 1330, "both_float32": 1240},
            measures="tokens_per_second",
        ),
    ),
    claims=(
        Claim(
            "Experts in attention have a lower loss than in feed-forward layers (.024)",
            "loss",
            "attention_float32",
            "feed_forward_float32",
        ),
        Claim(
            "Experts in both have a lower loss than in feed-forward layers alone (.035)",
            "loss",
            "both_float32",
            "feed_forward_float32",
        ),
        Claim(
            "Experts in both have a lower loss than in attention alone (.011)",
            "loss",
            "both_float32",
            "attention_float32",
        ),
        Claim(
            "In bfloat16, experts in attention diverge: their loss is at least a nat higher",
            "loss",
            "attention_float32",
            "attention_bfloat16",
            margin=1.0,
            paper="Switch table 10",
        ),
        Claim(
            "In bfloat16, feed-forward experts do not diverge (table 2)",
            "loss",
            "feed_forward_float32",
            "feed_forward_bfloat16",
            0.02,
            True,
        ),
        Claim(
            "Experts in attention have a lower loss than no experts",
            "loss",
            "attention_float32",
            "dense_float32",
        ),
        Claim(
            "With four times the steps, experts in attention lower the loss (ours)",
            "loss",
            "attention_x4",
            "dense_x4",
        ),
        Claim(
            "With gates that start at 1, experts in attention lower the loss (ours)",
            "loss",
            "attention_from_1",
            "dense_float32",
        ),
        Claim(
            "With experts in attention, gates that start at 1 lower the loss (ours)",
            "loss",
            "attention_from_1",
            "attention_float32",
        ),
        Claim(
            "With gates that start at 1, experts in both beat feed-forward layers alone (ours)",
            "loss",
            "both_from_1",
            "feed_forward_from_1",
        ),
    ),
    notes=(
        "From step 50 to 250, models with experts in attention have a lower training loss than "
        "dense models, and from then to step 1000 a higher one. With four times the steps (arms "
        "`_x4`), their loss is lower again after step 1400.",
        "Gates start at about 1/8. In the arms `_from_1` they are multiplied by 8 and start at "
        "about 1; three seeds do not resolve the effect on experts in attention.",
        "These models do not diverge in bfloat16. Settings that could make such small models "
        "diverge were not tried.",
    ),
)

get_config = ABLATION.get_config
