"""ST-MoE table 8: top-2 routing by the capacity factors of training and of evaluation.

The ablation in ``batch_priority.py`` compares priorities for the slots.
"""

from moe_jax.configs.common import router
from moe_jax.experiments.base import REGISTERED, beats_zlib, evaluated, saturated_model

from moe_jax.ablation.ablation import Ablation, Claim, Published

# Training factors, and the larger evaluation factor of table 8 for each.
_LARGER = {0.75: 2.0, 1.0: 2.0, 1.25: 2.0, 2.0: 3.0}


def _router(train: float, evaluation: float) -> dict:
    chosen = router("st_moe", capacity_factor=train, eval_capacity_factor=evaluation)
    return {"model.moe.router": chosen}


def _evaluated(train: float, evaluation: float) -> dict:
    """Returns the settings that evaluate the run of factor ``train`` with another factor."""
    return _router(train, evaluation) | evaluated(f"{train}")


ABLATION = Ablation(
    name="st_moe_capacity",
    title="ST-MoE table 8: capacity factors of training and of evaluation",
    base=saturated_model,
    arms={
        **{f"{train}": _router(train, train) for train in _LARGER},
        **{f"{train}_at_{larger}": _evaluated(train, larger) for train, larger in _LARGER.items()},
    },
    scales=REGISTERED,
    seeds=12,
    registered="e0083e1940936396e9a797ac14eb75ff6b22e312",
    published=(
        Published(
            "ST-MoE table 8 (2202.08906), top-2",
            "FLOPs of T5-Large, 32 experts, C4, 100k steps",
            "negative log perplexity in nats",
            {
                "0.75": -1.424,
                "1.0": -1.392,
                "1.25": -1.375,
                "2.0": -1.360,
                "0.75_at_2.0": -1.402,
                "1.0_at_2.0": -1.378,
                "1.25_at_2.0": -1.369,
                "2.0_at_3.0": -1.359,
            },
            measures="loss",
            negated=True,
        ),
    ),
    claims=(
        Claim("Factor 1.0 has a lower loss than 0.75", "loss", "1.0", "0.75"),
        Claim("Factor 2.0 has a lower loss than 1.0", "loss", "2.0", "1.0"),
        Claim(
            "A model trained at 0.75 has a lower loss when evaluated at 2.0",
            "loss",
            "0.75_at_2.0",
            "0.75",
        ),
        Claim(
            "A model trained at 0.75 drops fewer tokens when evaluated at 2.0",
            "eval_dropped",
            "0.75_at_2.0",
            "0.75",
            paper="ST-MoE table 8",
        ),
        Claim(
            "A model trained at 1.0 has a lower loss when evaluated at 2.0",
            "loss",
            "1.0_at_2.0",
            "1.0",
        ),
        Claim(
            "Training at 2.0 has a lower loss than training at 1.0, both evaluated at 2.0",
            "loss",
            "2.0",
            "1.0_at_2.0",
        ),
        Claim(
            "A model trained at 2.0 gains nothing when evaluated at 3.0",
            "loss",
            "2.0_at_3.0",
            "2.0",
            # Half of .014, which a model trained at 1.0 gains when evaluated at 2.0.
            0.007,
            True,
        ),
    ),
    gates=(
        beats_zlib("2.0"),
        Claim("factor 2.0 has a lower loss than factor 0.75", "loss", "2.0", "0.75"),
    ),
)

get_config = ABLATION.get_config
