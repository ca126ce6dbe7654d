"""An arm whose weights leave float32, and one that starts from them."""

import dataclasses

from moe_jax.ablation.ablation import Claim, Finished
from tests.ablation import tiny_ablation

ABLATION = dataclasses.replace(
    tiny_ablation.ABLATION,
    name="tiny_diverging",
    arms={
        "fast": {
            "optimizer.learning_rate": 1e6,
            "optimizer.rule.weight_decay": 1e6,
            "training.max_skipped_updates": 2,
        },
        "tuned": {"training.start_from": Finished("fast")},
        "slow": {"training.max_skipped_updates": 2},
    },
    seeds=1,
    published=(),
    claims=(Claim("A slow start is better", "loss", "slow", "fast"),),
)

get_config = ABLATION.get_config
