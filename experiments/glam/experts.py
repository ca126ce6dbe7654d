"""GLaM: dense and MoE models of equal FLOPs per token, by number of experts."""

from moe_jax.configs.common import router
from moe_jax.experiments.base import REGISTERED, beats_zlib, saturated_model

from moe_jax.ablation.ablation import Ablation, Claim
from moe_jax.ablation.overlay import Overlay

_ARMS = {"dense": 1, **{f"e{n}": n for n in (4, 16, 64)}}


def _arm(experts: int) -> dict:
    # A token has two experts of half the width, so its FLOPs equal the dense model's.
    return {
        "model.moe.num_experts": experts,
        "model.moe.expert_dim": lambda config: config.model.mlp_dim // 2,
        "model.moe.router": router("glam"),
    }


ABLATION = Ablation(
    name="glam_experts",
    title="GLaM: number of experts at fixed active parameters",
    base=saturated_model,
    arms={
        "dense": {"model.moe.every": 0},
        **{arm: _arm(n) for arm, n in _ARMS.items() if n > 1},
    },
    scales=REGISTERED,
    seeds=12,
    registered="dc57d6faa22382212a04ba26a7f1fd9334ff4c1e",
    claims=(
        Claim(
            "16 experts have a lower loss than a dense model of equal FLOPs",
            "loss",
            "e16",
            "dense",
            paper="GLaM (2112.06905), which prints only scores",
        ),
        Claim(
            "64 experts have a lower loss than 4",
            "loss",
            "e64",
            "e4",
            paper="GLaM: scores improve up to 64 experts; no loss is printed",
        ),
        Claim(
            "64 experts have a lower loss than 16",
            "loss",
            "e64",
            "e16",
            paper="GLaM: scores improve up to 64 experts; no loss is printed",
        ),
    ),
    gates=(beats_zlib(),),
    overlay=Overlay(label="experts", places=_ARMS),
)

get_config = ABLATION.get_config
