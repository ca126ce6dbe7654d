"""Switch table 1: dense, top-2 and Switch at capacity factors 2.0, 1.25 and 1.0."""

from moe_jax.configs.common import router
from moe_jax.experiments.base import SCALES, language_model

from moe_jax.ablation.ablation import Ablation, Claim, Published


def _arm(preset: str, factor: float) -> dict:
    # As in Mesh-TensorFlow, the factor multiplies S / E for any k, so all arms have equal slots.
    chosen = router(preset, capacity_factor=factor, eval_capacity_factor=2 * factor)
    return {"model.moe.router": chosen}


ABLATION = Ablation(
    name="switch_capacity_factor",
    title="Switch table 1: capacity factor",
    base=language_model,
    arms={
        "dense": {"model.moe.every": 0},
        "top2_2.0": _arm("gshard", 2.0),
        "switch_2.0": _arm("switch", 2.0),
        "top2_1.25": _arm("gshard", 1.25),
        "switch_1.25": _arm("switch", 1.25),
        "top2_1.0": _arm("gshard", 1.0),
        "switch_1.0": _arm("switch", 1.0),
        "switch_0.5": _arm("switch", 0.5),
    },
    scales=SCALES,
    published=(
        Published(
            "Switch table 1 (2101.03961)",
            "T5-Base with 128 experts, C4, 100k steps",
            "negative log perplexity in nats",
            {
                "dense": -1.731,
                "top2_2.0": -1.547,
                "switch_2.0": -1.554,
                "top2_1.25": -1.559,
                "switch_1.25": -1.553,
                "top2_1.0": -1.572,
                "switch_1.0": -1.561,
            },
            measures="loss",
            negated=True,
        ),
        Published(
            "Switch table 1 (2101.03961)",
            "the same on 32 cores of TPU v3",
            "examples per second",
            {
                "dense": 1600,
                "top2_2.0": 840,
                "switch_2.0": 860,
                "top2_1.25": 790,
                "switch_1.25": 910,
                "top2_1.0": 860,
                "switch_1.0": 1000,
            },
            measures="tokens_per_second",
        ),
        Published(
            "Switch table 1 (2101.03961)",
            "the same on 32 cores of TPU v3",
            "hours to a negative log perplexity of -1.50",
            {
                "top2_2.0": 68.7,
                "switch_2.0": 72.8,
                "top2_1.25": 80.7,
                "switch_1.25": 65.0,
                "top2_1.0": 80.1,
                "switch_1.0": 62.8,
            },
            measures="seconds_to",
        ),
    ),
    claims=(
        Claim(
            "Switch has a lower loss than a dense model of equal FLOPs",
            "loss",
            "switch_1.25",
            "dense",
        ),
        Claim(
            "Switch reaches the last loss of the dense model in fewer steps",
            "steps_to",
            "switch_1.25",
            "dense",
            paper="Switch table 1: T5-Base does not reach -1.50 in 100k steps",
        ),
        Claim(
            "Capacity factor 2.0 drops fewer tokens than 1.0",
            "dropped",
            "switch_2.0",
            "switch_1.0",
            paper="Switch section 2.2: under 1 % are dropped",
        ),
        Claim(
            "Capacity factor 0.5 drops more tokens than 1.0 (ours)",
            "dropped",
            "switch_1.0",
            "switch_0.5",
        ),
        Claim(
            "Capacity factor 0.5 has a higher loss than 2.0 (ours)",
            "loss",
            "switch_2.0",
            "switch_0.5",
        ),
        Claim(
            "Capacity factors 1.0 and 2.0 have about the same loss",
            "loss",
            "switch_2.0",
            "switch_1.0",
            0.02,
            True,
        ),
    ),
    notes=(
        "At equal slots, top-2 has a lower loss than Switch here, by 0.07, 0.03 and 0.01 nats at "
        "factors 2.0, 1.25 and 1.0, although 36 % of its choices are dropped at factor 1.0. In "
        "the paper, top-2 is better by 0.007 nats at factor 2.0, and Switch is better by 0.006 "
        "and 0.011 nats at factors 1.25 and 1.0.",
    ),
    threshold_arm="dense",
)

get_config = ABLATION.get_config
