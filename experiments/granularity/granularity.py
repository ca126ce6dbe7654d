"""Krajewski et al. 2024: experts cut into G parts, of which a token meets G times as many."""

from configs.common import router
from experiments.ablation import Ablation, Claim, Published
from experiments.base import SCALES, language_model


def _arm(parts: int) -> dict:
    return {
        "model.moe.num_experts": 8 * parts,
        "model.moe.expert_dim": lambda config: config.model.mlp_dim // parts,
        "model.moe.router": router("qwen3_moe", k=parts, balance_weight=1e-2),
    }


ABLATION = Ablation(
    name="granularity",
    title="Granularity of experts",
    base=language_model,
    arms={f"g{parts}": _arm(parts) for parts in (1, 2, 4, 8)},
    scales=SCALES,
    published=(
        Published(
            "Krajewski et al. 2024 (2402.07871), their law",
            "64 experts' worth, 25M active parameters, 66B tokens",
            "loss in nats",
            {"g1": 3.109, "g2": 3.045, "g4": 3.003, "g8": 2.974},
        ),
    ),
    claims=(
        Claim("G = 2 is better than 1 (.064)", "loss", "g2", "g1"),
        Claim("G = 8 is better than 1 (.135)", "loss", "g8", "g1"),
    ),
)

get_config = ABLATION.get_config
