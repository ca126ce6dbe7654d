"""ST-MoE: the router's z-loss."""

from configs.common import router
from experiments.ablation import Ablation, Claim
from experiments.base import SCALES, language_model

ABLATION = Ablation(
    name="st_moe_z_loss",
    title="ST-MoE: z-loss of the router",
    base=language_model,
    arms={
        name: {"model.moe.router": router("st_moe", z_weight=weight)}
        for name, weight in {"none": 0.0, "1e-3": 1e-3, "1e-2": 1e-2}.items()
    },
    scales=SCALES,
    claims=(Claim("1e-3 does not hurt quality", "loss", "1e-3", "none", 0.02, True),),
)

get_config = ABLATION.get_config
