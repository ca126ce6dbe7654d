"""Pilot of the scale ``cpu``: the learning rate of the dense model, and the gates of the regime.

``experiments/registration.md`` has the rules. The seeds are for tuning; no verdict uses them.
"""

from ml_collections import ConfigDict
from moe_jax.configs.common import router
from moe_jax.experiments.base import SINGLE_PASS, language_model

from moe_jax.ablation.ablation import Ablation, Claim

# The rate of the last two arms: a placeholder until the arms ``dense_...`` have ended, then the
# rate with their lowest mean validation loss over both seeds.
RATE = 3e-2
_DENSE = {"model.moe.every": 0}
_RATES = {"dense_3e-3": 3e-3, "dense_1e-2": 1e-2, "dense_3e-2": 3e-2, "dense_6e-2": 6e-2}


def _double(config: ConfigDict) -> int:
    return 2 * config.training.steps


ABLATION = Ablation(
    name="pilot_regime",
    title="Pilot: learning rate of the dense model, and gates of the regime",
    base=language_model,
    arms={name: _DENSE | {"optimizer.learning_rate": rate} for name, rate in _RATES.items()}
    | {
        "dense_double": _DENSE | {"optimizer.learning_rate": RATE, "training.steps": _double},
        "glam_e16": {
            "optimizer.learning_rate": RATE,
            "model.moe.num_experts": 16,
            "model.moe.expert_dim": lambda config: config.model.mlp_dim // 2,
            "model.moe.router": router("glam"),
        },
    },
    scales={"cpu": SINGLE_PASS},
    seeds=2,
    first_seed=100,
    claims=(
        Claim(
            "Gate b: twice the tokens lower the dense model's loss by less than 16 experts do",
            "loss",
            "glam_e16",
            "dense_double",
        ),
    ),
    notes=(
        "Gate a asks that the chosen rate is within a factor of 2 of the dense model's optimum.",
        "Gate c asks that the dense model needs fewer bits per byte of the validation text than "
        "zlib; `results.jsonl` has both.",
    ),
)

get_config = ABLATION.get_config
