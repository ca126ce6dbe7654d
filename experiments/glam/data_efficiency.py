"""GLaM: dense and MoE models of equal FLOPs per token, by training tokens, FLOPs and energy.

The arms with half and twice the steps have their own learning-rate schedules, which decay fully.
"""

from ml_collections import ConfigDict
from moe_jax.configs.common import router
from moe_jax.experiments.base import REGISTERED, beats_zlib, saturated_model

from moe_jax.ablation.ablation import Ablation, Claim, Published

_DENSE = {"model.moe.every": 0}
# A token has two experts of half the width, so its FLOPs equal the dense model's.
_MOE = {
    "model.moe.num_experts": 16,
    "model.moe.expert_dim": lambda config: config.model.mlp_dim // 2,
    "model.moe.router": router("glam"),
}


def _steps(times: float) -> dict:
    def scaled(config: ConfigDict) -> int:
        return round(config.training.steps * times)

    return {"training.steps": scaled}


ABLATION = Ablation(
    name="glam_data_efficiency",
    title="GLaM: loss against tokens, FLOPs and energy",
    base=saturated_model,
    arms={
        "dense": _DENSE,
        "dense_double": _DENSE | _steps(2),
        "moe": _MOE,
        "moe_half": _MOE | _steps(0.5),
    },
    scales=REGISTERED,
    seeds=12,
    registered="dc57d6faa22382212a04ba26a7f1fd9334ff4c1e",
    published=(
        Published(
            "GLaM (2112.06905), against GPT-3",
            "64B/64E with 600B tokens and 456 MWh, GPT-3 with 1287 MWh",
            "average one-shot score",
            {"moe": 65.5, "dense": 61.6},
        ),
    ),
    claims=(
        Claim(
            "At equal tokens and FLOPs, the MoE model has a lower loss than the dense model",
            "loss",
            "moe",
            "dense",
            paper="GLaM (2112.06905), which prints only scores",
        ),
        Claim(
            "The MoE model with half the tokens has a lower loss than the dense model (ours)",
            "loss",
            "moe_half",
            "dense",
        ),
        Claim(
            "Twice the tokens lower the loss of a dense model (ours)",
            "loss",
            "dense_double",
            "dense",
        ),
    ),
    gates=(
        beats_zlib(),
        Claim(
            "twice the tokens lower the dense model's loss by less than 16 experts do",
            "loss",
            "moe",
            "dense_double",
        ),
    ),
    threshold_arm="dense",
    against=("tokens", "flops", "energy"),
)

get_config = ABLATION.get_config
