"""Schedules of capacity and of the balance loss, against constants, for a Switch model.

All arms have slots for a factor of 2 and are evaluated with a factor of 2, so their steps have
equal FLOPs; the factor limits how many tokens the slots take.
"""

from ml_collections import ConfigDict
from moe_jax.configs.common import router
from moe_jax.experiments.base import REGISTERED, beats_zlib, saturated_model

from moe_jax.ablation.ablation import Ablation, Claim


def _with(capacity: tuple[float, float], balance: tuple[float, float] = (1e-2, 1e-2)) -> dict:
    """Returns the settings of straight lines from the first to the last step."""
    values = {"capacity_factor": capacity, "balance_weight": balance}

    def schedules(config: ConfigDict) -> tuple[dict, ...]:
        steps = 1, config.training.steps
        return tuple({"setting": k, "steps": steps, "values": v} for k, v in values.items())

    chosen = router("switch", capacity_factor=2.0, eval_capacity_factor=2.0)
    return {"model.moe.router": chosen, "training.schedules": schedules}


ABLATION = Ablation(
    name="schedules",
    title="Schedules of capacity and of the balance loss",
    base=saturated_model,
    arms={
        "dense": {"model.moe.every": 0},
        "capacity_1": _with((1.0, 1.0)),
        "capacity_2": _with((2.0, 2.0)),
        "capacity_rises": _with((1.0, 2.0)),
        "capacity_falls": _with((2.0, 1.0)),
        "balance_falls": _with((2.0, 2.0), (1e-2, 0.0)),
        "balance_rises": _with((2.0, 2.0), (0.0, 1e-2)),
    },
    scales=REGISTERED,
    seeds=12,
    registered="45f4a8b3081be85e349888ee49e8b75038380e8e",
    claims=(
        Claim(
            "A capacity factor of 2 has a lower loss than a factor of 1 (ours)",
            "loss",
            "capacity_2",
            "capacity_1",
        ),
        Claim(
            "A factor that rises from 1 to 2 has a lower loss than one that falls (ours)",
            "loss",
            "capacity_rises",
            "capacity_falls",
        ),
        Claim(
            "A rising factor costs at most 0.01 nats against a factor of 2 (ours)",
            "loss",
            "capacity_2",
            "capacity_rises",
            0.01,
            True,
        ),
        Claim(
            "A balance loss that ends at 0 has a lower loss than a constant one (ours)",
            "loss",
            "balance_falls",
            "capacity_2",
        ),
        Claim(
            "A balance loss that starts at 0 has a higher loss than a constant one (ours)",
            "loss",
            "capacity_2",
            "balance_rises",
        ),
    ),
    gates=(beats_zlib(),),
    notes=("Some runs were paused while they trained, and their seconds include the pause.",),
)

get_config = ABLATION.get_config
