"""Switch table 9: larger dense models against experts, at equal FLOPs per token in pairs.

The printed models have 124 (Base) and 425 (Large) billion FLOPs per sequence, a ratio of 3.4. Here
``large`` has half as many layers again, of half as much width again. At the scale ``cpu`` the ratio
is 2.6, since the head and the attention grow less.
"""

from typing import Any

from moe_jax.experiments.base import REGISTERED, beats_zlib, gates_from_one, saturated_model

from moe_jax.ablation.ablation import Ablation, Claim, Published

_DENSE = {"model.moe.every": 0}


def _half_more(value: int) -> int:
    return value * 3 // 2


_LARGE: dict[str, Any] = {
    "model.num_layers": lambda config: _half_more(config.model.num_layers),
    "model.num_heads": lambda config: _half_more(config.model.num_heads),
    "model.width": lambda config: _half_more(config.model.width),
    "model.mlp_dim": lambda config: _half_more(config.model.mlp_dim),
    "model.moe.expert_dim": lambda config: _half_more(config.model.moe.expert_dim),
}


ABLATION = Ablation(
    name="switch_sizes",
    title="Switch table 9: experts against larger dense models",
    base=saturated_model,
    arms={
        "dense": _DENSE,
        "large": _DENSE | _LARGE,
        "switch": {},
        "switch_large": _LARGE,
        "switch_from_1": {"model.moe.router": gates_from_one},
        "switch_large_from_1": _LARGE | {"model.moe.router": gates_from_one},
    },
    scales=REGISTERED,
    seeds=12,
    registered="e90b02317928ad136f1a263f3e10cde51017ed4e",
    published=(
        Published(
            "Switch table 9 (2101.03961)",
            "T5-Base, T5-Large, Switch-Base and Switch-Large (128 experts), C4, 250k steps",
            "negative log perplexity in nats",
            {"dense": -1.599, "large": -1.402, "switch": -1.370, "switch_large": -1.248},
            measures="loss",
            negated=True,
        ),
    ),
    claims=(
        Claim(
            "Switch has a lower loss than the dense model of equal FLOPs (.229)",
            "loss",
            "switch",
            "dense",
        ),
        Claim(
            "The large Switch has a lower loss than the large dense model (.154)",
            "loss",
            "switch_large",
            "large",
        ),
        Claim(
            "The large Switch has a lower loss than the small one (.122)",
            "loss",
            "switch_large",
            "switch",
        ),
        Claim(
            "Switch has a lower loss than the large dense model (.032)",
            "loss",
            "switch",
            "large",
        ),
        Claim(
            "Gates that start at 1 lower the loss of the large Switch (ours)",
            "loss",
            "switch_large_from_1",
            "switch_large",
        ),
    ),
    gates=(beats_zlib(),),
)

get_config = ABLATION.get_config
