"""Shazeer et al. 2017, appendix A: losses that spread importance and load over experts.

An arm is named after the losses that it has; the weights sum to 0.2. ``neither`` has no such loss.
"""

from moe_jax.configs.common import router
from moe_jax.experiments.base import DROPLESS, REGISTERED, beats_zlib, saturated_model

from moe_jax.ablation.ablation import Ablation, Claim, Published


def _arm(importance: float, load: float) -> dict:
    chosen = router("noisy_top_k", k=4, importance_weight=importance, load_weight=load)
    return DROPLESS | {
        "model.moe.num_experts": 32,
        "model.moe.expert_dim": lambda config: config.model.mlp_dim // 4,
        "model.moe.router": chosen,
    }


ABLATION = Ablation(
    name="shazeer_spread_losses",
    title="Sparsely-gated MoE: losses of importance and load",
    base=saturated_model,
    arms={
        "neither": _arm(0.0, 0.0),
        "importance": _arm(0.2, 0.0),
        "load": _arm(0.0, 0.2),
        "both": _arm(0.1, 0.1),
    },
    scales=REGISTERED,
    seeds=12,
    registered="79ab82e714fb0f1a14c5c6ed6fbcb2a2121c2314",
    metric="eval_violation",
    published=(
        Published(
            "Shazeer et al. 2017 (1701.06538), appendix A, largest over mean load, minus 1",
            "2 LSTM layers around 256 experts, 8M operations per word",
            "largest load of an expert over the mean load, minus 1",
            {"neither": 16.8, "importance": 0.47, "load": 0.15, "both": 0.14},
            measures="eval_violation",
        ),
    ),
    claims=(
        Claim(
            "A loss of importance makes loads more even",
            "eval_violation",
            "importance",
            "neither",
        ),
        Claim("A loss of load makes loads more even", "eval_violation", "load", "neither"),
        Claim(
            "A loss of load makes loads more even than one of importance",
            "eval_violation",
            "load",
            "importance",
        ),
        Claim(
            "Both losses have a lower loss than neither",
            "loss",
            "both",
            "neither",
            paper="Shazeer et al. 2017: models without them have worse perplexity, in words",
        ),
    ),
    gates=(beats_zlib("both"),),
)

get_config = ABLATION.get_config
