"""Upcycling a dense model, against further dense training and against training from scratch.

All arms have the FLOPs per token of the dense model, and all further training has equal FLOPs: half
of the steps of the dense model, with the same rate. The experts are virtual groups (He et al.
2024), two experts of half width per token, so the first logits are those of the dense model.
"""

from moe_jax.configs.common import router
from moe_jax.experiments.base import REGISTERED, beats_zlib, saturated_model

from moe_jax.ablation.ablation import Ablation, Changed, Claim, Finished, Published

_DENSE = {"model.moe.every": 0}
_FURTHER = {
    "training.steps": lambda config: config.training.steps // 2,
    "training.checkpoint_every": lambda config: config.training.checkpoint_every // 2,
}
_MIXTURE = {
    "model.moe.num_experts": 16,
    "model.moe.expert_dim": lambda config: config.model.mlp_dim // 2,
    "model.moe.router": router("mixtral", k=2),
}
_FLAGS = ("--experts=16", "--k=2", "--shards=2", "--router=mixtral")


def _upcycled(*flags: str) -> dict:
    start = Changed("dense", "upcycle", (*_FLAGS, *flags))
    return _MIXTURE | _FURTHER | {"training.start_from": start}


ABLATION = Ablation(
    name="upcycling",
    title="Upcycling a dense model",
    base=saturated_model,
    arms={
        "dense": _DENSE,
        "dense_further": _DENSE | _FURTHER | {"training.start_from": Finished("dense")},
        "upcycled": _upcycled(),
        "upcycled_redrawn": _upcycled("--redrawn=0.5"),
        "scratch": _MIXTURE | _FURTHER,
    },
    scales=REGISTERED,
    seeds=12,
    registered="e51f927efdd154758a927de64b45a43d320d3f3f",
    published=(
        Published(
            "He et al. 2024 (2410.07524)",
            "Nemotron-4 15B and its upcycled mixture, both trained for 1T further tokens",
            "MMLU, %",
            {"dense_further": 65.3, "upcycled": 67.6},
        ),
    ),
    claims=(
        Claim(
            "Upcycling has a lower loss than further training of the dense model",
            "loss",
            "upcycled",
            "dense_further",
            paper="He et al. 2024 (2410.07524): MMLU 67.6 against 65.3 after 1T tokens",
        ),
        Claim(
            "Upcycling has a lower loss than training from scratch with the same further compute",
            "loss",
            "upcycled",
            "scratch",
            paper="Komatsuzaki et al. 2022 (2212.05055): scratch needs 1.2 times the dense budget",
        ),
        Claim(
            "Redrawing half of the hidden units lowers the loss of upcycling",
            "loss",
            "upcycled_redrawn",
            "upcycled",
            paper="Drop-Upcycling (2502.19261)",
        ),
    ),
    gates=(beats_zlib(),),
    notes=(
        "Some runs were paused while they trained, and their seconds include the pause.",
        "The redrawn units of these runs have the mean and the deviation of all units of their "
        "expert. Since 1 December 2026, `upcycle --redrawn` takes those of the redrawn units, as "
        "the paper does.",
    ),
)

get_config = ABLATION.get_config
