"""GShard and Mesh-TensorFlow: when the second expert is used."""

from configs.common import router
from experiments.ablation import Ablation, Claim
from experiments.base import SCALES, language_model


def _arm(second: str) -> dict:
    return {"model.moe.router": router("top2_mtf", second=second)}


ABLATION = Ablation(
    name="gshard_second_expert",
    title="GShard: policies of the second expert",
    base=language_model,
    arms={name: _arm(name) for name in ("all", "none", "threshold", "random")},
    scales=SCALES,
    claims=(Claim("A second expert helps", "loss", "all", "none"),),
)

get_config = ABLATION.get_config
