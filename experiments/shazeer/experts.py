"""Shazeer et al. 2017: more experts at equal operations per token, four experts per token."""

import math

from moe_jax.configs.common import router
from moe_jax.experiments.base import DROPLESS, REGISTERED, beats_zlib, saturated_model

from moe_jax.ablation.ablation import Ablation, Claim, Published
from moe_jax.ablation.overlay import Overlay

_ARMS = {f"e{n}": n for n in (4, 32, 256)}
_PERPLEXITIES = {"e4": 45.0, "e32": 39.7, "e256": 35.7}
_LOSSES = {arm: math.log(perplexity) for arm, perplexity in _PERPLEXITIES.items()}


def _arm(experts: int) -> dict:
    return DROPLESS | {
        "model.moe.num_experts": experts,
        "model.moe.expert_dim": lambda config: config.model.mlp_dim // 4,
        "model.moe.router": router("noisy_top_k", k=4),
    }


ABLATION = Ablation(
    name="shazeer_experts",
    title="Sparsely-gated MoE: number of experts at equal operations",
    base=saturated_model,
    arms={
        "dense": {"model.moe.every": 0},
        **{arm: _arm(experts) for arm, experts in _ARMS.items()},
    },
    scales=REGISTERED,
    seeds=12,
    registered="79ab82e714fb0f1a14c5c6ed6fbcb2a2121c2314",
    published=(
        Published(
            "Shazeer et al. 2017 (1701.06538), flat experts, logarithm of the perplexities",
            "2 LSTM layers around 4, 32 or 256 experts of 1M parameters, 8M operations per word",
            "loss in nats per word on the 1-billion-word corpus",
            _LOSSES,
            measures="loss",
        ),
    ),
    claims=(
        Claim("32 experts have a lower loss than 4", "loss", "e32", "e4"),
        Claim("256 experts have a lower loss than 32", "loss", "e256", "e32"),
        Claim(
            "4 experts for every token are no better than a dense model (ours)",
            "loss",
            "dense",
            "e4",
            0.01,
            True,
        ),
    ),
    overlay=Overlay(
        label="experts",
        places=_ARMS,
        series={"Shazeer et al. 2017": {_ARMS[arm]: loss for arm, loss in _LOSSES.items()}},
    ),
    gates=(beats_zlib(),),
)

get_config = ABLATION.get_config
