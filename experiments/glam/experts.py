"""GLaM: dense and MoE models of equal FLOPs per token, by number of experts."""

from moe_jax.configs.common import router
from moe_jax.experiments.base import SCALES, language_model

from moe_jax.ablation.ablation import Ablation, Claim


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
    base=language_model,
    arms={"dense": {"model.moe.every": 0}, **{f"e{n}": _arm(n) for n in (4, 16, 64)}},
    scales=SCALES,
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
    ),
)

get_config = ABLATION.get_config
