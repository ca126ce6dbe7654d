"""Pilot of the scale ``cpu``: the learning rate of the dense model, and the gates of the regime.

``experiments/registration.md`` has the rules. The seeds are for tuning; no verdict uses them.
"""

from ml_collections import ConfigDict
from moe_jax.configs.common import router
from moe_jax.experiments.base import SATURATED, beats_zlib, saturated_model

from moe_jax.ablation.ablation import Ablation, Claim

# Rate of the arms ``dense_double`` and ``glam_e16``. At 2e-2, the mean loss of the dense model over
# both seeds is lower by 0.006 nats.
RATE = 1e-2
_DENSE = {"model.moe.every": 0}
_RATES = {"dense_3e-3": 3e-3, "dense_1e-2": 1e-2, "dense_3e-2": 3e-2, "dense_6e-2": 6e-2}
_NEIGHBOURS = {"dense_5e-3": 5e-3, "dense_2e-2": 2e-2}


def _double(config: ConfigDict) -> int:
    return 2 * config.training.steps


ABLATION = Ablation(
    name="pilot_regime",
    title="Pilot: learning rate of the dense model, and gates of the regime",
    base=saturated_model,
    arms={
        name: _DENSE | {"optimizer.learning_rate": rate}
        for name, rate in (_RATES | _NEIGHBOURS).items()
    }
    | {
        "glam_e16": {
            "optimizer.learning_rate": RATE,
            "model.moe.expert_dim": lambda config: config.model.mlp_dim // 2,
            "model.moe.router": router("glam"),
        },
        "dense_double": _DENSE | {"optimizer.learning_rate": RATE, "training.steps": _double},
    },
    scales={"cpu": SATURATED},
    seeds=2,
    first_seed=100,
    claims=(
        Claim(
            "Gate a: a rate of 2e-2 has a lower loss than 1e-2", "loss", "dense_2e-2", "dense_1e-2"
        ),
        Claim(
            "Gate a: a rate of 2e-2 has a lower loss than 3e-2", "loss", "dense_2e-2", "dense_3e-2"
        ),
        Claim(
            "Gate b: twice the tokens lower the dense model's loss by less than 16 experts do",
            "loss",
            "glam_e16",
            "dense_double",
        ),
    ),
    gates=(beats_zlib("dense_1e-2"),),
    notes=(
        "Gate a compares means: with two seeds, its intervals are wide.",
        "Gate c asks that the dense model needs fewer bits per byte of the validation text than "
        "zlib; `results.jsonl` has both.",
    ),
)

get_config = ABLATION.get_config
