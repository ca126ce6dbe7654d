"""GShard and Mesh-TensorFlow: policies that keep or cancel a token's second expert.

The first four arms are policies of Mesh-TensorFlow; ``random`` keeps the second expert with
probability ``min(1, g2 / 0.2)``. GShard keeps it with probability ``min(1, 2 * g2)``, and a
cancelled choice still occupies a position in the queue of its expert.
"""

from moe_jax.configs.common import router
from moe_jax.experiments.base import SCALES, language_model

from moe_jax.ablation.ablation import Ablation, Claim


def _arm(second: str) -> dict:
    return {"model.moe.router": router("top2_mtf", second=second)}


ABLATION = Ablation(
    name="gshard_second_expert",
    title="GShard: policies for the second expert",
    base=language_model,
    arms={
        **{name: _arm(name) for name in ("all", "none", "threshold", "random")},
        "gshard": {"model.moe.router": router("gshard", capacity_factor=1.25)},
    },
    scales=SCALES,
    claims=(
        Claim("A second expert lowers the loss (ours)", "loss", "all", "none"),
        Claim(
            "Keeping the second expert at random raises the loss by less than 0.02 (ours)",
            "loss",
            "random",
            "all",
            margin=-0.02,
        ),
        Claim(
            "GShard's rule raises the loss over Mesh-TensorFlow's by less than 0.02 (ours)",
            "loss",
            "gshard",
            "random",
            -0.02,
        ),
    ),
)

get_config = ABLATION.get_config
