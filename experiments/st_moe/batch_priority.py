"""ST-MoE table 18: slots for the first tokens, or for the tokens of highest score.

The model is an encoder-decoder, as in the paper. Only the encoder assigns slots by score, as in
flaxformer's released configurations: in a causal decoder, later tokens would affect the drops.
"""

from ml_collections import ConfigDict
from moe_jax.configs import span_corruption
from moe_jax.configs.common import router
from moe_jax.experiments.base import SPANS

from moe_jax.ablation.ablation import Ablation, Claim, Published

_FACTORS = (0.75, 1.0, 1.25)


def _base() -> ConfigDict:
    return span_corruption.get_config("switch")


def _arm(factor: float, priority: str) -> dict:
    choices = {
        "capacity_factor": factor,
        "eval_capacity_factor": factor,
        "z_weight": 1e-3,
        "input_jitter": 0.0,
    }
    return {
        "model.encoder_moe.router": router("switch_mtf", priority=priority, **choices),
        "model.decoder_moe.router": router("switch_mtf", **choices),
    }


ABLATION = Ablation(
    name="st_moe_batch_priority",
    title="ST-MoE: batch-prioritised routing of top-1",
    base=_base,
    arms={
        f"{name}_{factor}": _arm(factor, priority)
        for factor in _FACTORS
        for name, priority in (("order", "choice"), ("score", "score"))
    },
    scales=SPANS,
    published=(
        Published(
            "ST-MoE table 18 (2202.08906), evaluated at the capacity of training",
            "FLOPs of T5-Large, 32 experts, top-1, C4, 100k steps",
            "negative log perplexity in nats",
            {
                "order_0.75": -1.428,
                "score_0.75": -1.409,
                "order_1.0": -1.397,
                "score_1.0": -1.386,
                "order_1.25": -1.378,
                "score_1.25": -1.376,
            },
            measures="loss",
            negated=True,
        ),
    ),
    claims=(
        Claim(
            "At factor 0.75, priority by score has a lower loss than by position (.019)",
            "loss",
            "score_0.75",
            "order_0.75",
        ),
        Claim(
            "At factor 1.0, priority by score has a lower loss than by position (.011)",
            "loss",
            "score_1.0",
            "order_1.0",
        ),
        Claim(
            "At factor 1.25, both priorities have about the same loss (.002)",
            "loss",
            "score_1.25",
            "order_1.25",
            0.02,
            True,
        ),
        Claim(
            "By position, factor 1.25 has a lower loss than 0.75 (.050)",
            "loss",
            "order_1.25",
            "order_0.75",
        ),
        Claim("Factor 1.25 drops fewer tokens than 0.75", "dropped", "order_1.25", "order_0.75"),
    ),
)

get_config = ABLATION.get_config
