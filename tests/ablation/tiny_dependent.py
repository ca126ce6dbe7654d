"""Arms that need the finished runs of others."""

import dataclasses

from moe_jax.ablation.ablation import Claim, Finished
from tests.ablation import tiny_ablation

ABLATION = dataclasses.replace(
    tiny_ablation.ABLATION,
    name="tiny_dependent",
    arms={
        "student": {"model.moe.every": 0, "training.teacher": Finished("teacher")},
        "teacher": {"model.moe.num_experts": 2},
        "tuned": {
            "model.moe.every": 0,
            "training.start_from": Finished("student"),
            "training.steps": lambda config: config.training.steps - 1,
        },
    },
    seeds=1,
    published=(),
    claims=(Claim("Learning from a teacher helps", "loss", "tuned", "student"),),
)

get_config = ABLATION.get_config
