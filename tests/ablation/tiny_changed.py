"""An arm that trains a changed run, and one that evaluates it."""

import dataclasses

from moe_jax.ablation.ablation import Changed, Claim
from tests.ablation import tiny_ablation

_SMALLER = {"model.moe.num_experts": 2}
_PRUNE = ("prune", ("--experts=2", "--by=load"))

ABLATION = dataclasses.replace(
    tiny_ablation.ABLATION,
    name="tiny_changed",
    arms={
        "switch": {"model.moe.num_experts": 4},
        "pruned": _SMALLER
        | {
            "training.start_from": Changed("switch", *_PRUNE, trained_on=False),
            "training.steps": lambda _: 1,
            "optimizer.learning_rate": lambda _: 1e-30,
        },
        "recovered": _SMALLER | {"training.start_from": Changed("switch", *_PRUNE)},
    },
    seeds=1,
    published=(),
    claims=(Claim("Training recovers the loss", "loss", "recovered", "pruned"),),
)

get_config = ABLATION.get_config
