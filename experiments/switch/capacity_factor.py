"""Switch table 1: dense, top-2 and Switch at capacity factors 2.0, 1.25 and 1.0."""

from configs.common import router
from experiments.ablation import Ablation, Claim, Published
from experiments.base import SCALES, language_model


def _arm(preset: str, factor: float) -> dict:
    # Top-2 spends twice the FLOPs, as in the table.
    per_expert = factor if preset == "switch" else 2 * factor
    return {
        "model.moe.router": router(
            preset, capacity_factor=per_expert, eval_capacity_factor=2 * per_expert
        )
    }


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
        ),
    ),
    claims=(
        Claim("Switch is better than its dense twin", "loss", "switch_1.25", "dense"),
        Claim("A larger capacity drops less", "dropped", "switch_2.0", "switch_1.0"),
        Claim("and half of it drops more", "dropped", "switch_1.0", "switch_0.5"),
        Claim("Half the capacity costs loss", "loss", "switch_2.0", "switch_0.5"),
        Claim("Capacity 1.0 and 2.0 are close", "loss", "switch_2.0", "switch_1.0", 0.02, True),
    ),
)

get_config = ABLATION.get_config
