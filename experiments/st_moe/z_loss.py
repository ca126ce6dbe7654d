"""ST-MoE: the z-loss of the router."""

from moe_jax.configs.common import router
from moe_jax.experiments.base import SCALES, language_model

from moe_jax.ablation.ablation import Ablation, Claim, Published

ABLATION = Ablation(
    name="st_moe_z_loss",
    title="ST-MoE: z-loss of the router",
    base=language_model,
    arms={
        name: {"model.moe.router": router("st_moe", z_weight=weight)}
        for name, weight in {"none": 0.0, "1e-3": 1e-3, "1e-2": 1e-2}.items()
    },
    scales=SCALES,
    published=(
        Published(
            "ST-MoE, study of stability (2202.08906)",
            "FLOPs of T5-XL, 32 experts, top-2; stable runs: 4 of 6 without, 3 of 3 with z-loss",
            "negative log perplexity in nats, each ± .02",
            {"none": -1.755, "1e-3": -1.741},
            measures="loss",
            negated=True,
        ),
    ),
    claims=(
        Claim(
            "A z-loss of weight 1e-3 does not raise the loss", "loss", "1e-3", "none", margin=-0.02
        ),
    ),
)

get_config = ABLATION.get_config
