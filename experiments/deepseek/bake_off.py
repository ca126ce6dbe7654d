"""DeepSeekMoE table 1 in miniature: dense, hash, Switch, GShard, fine-grained with a shared one."""

from configs.common import router
from experiments.ablation import Ablation, Claim, Published
from experiments.base import DROPLESS, SCALES, language_model

# As in the paper nothing is dropped, and every balance loss has the weight 0.01; that of top-2 is
# a sum over both choices.
_MOE = DROPLESS | {"model.moe.num_experts": 16}
_TOP1 = router("olmoe", k=1, balance_weight=0.01, z_weight=0.0)
_TOP2 = router("mixtral", k=2, balance_weight=0.005)
_FINE = DROPLESS | {
    "model.moe.num_experts": 63,
    "model.moe.expert_dim": lambda config: config.model.mlp_dim // 4,
    "model.moe.shared.hidden": lambda config: config.model.mlp_dim // 4,
    "model.moe.router": router("deepseek_moe", k=7, balance_weight=0.01),
}

ABLATION = Ablation(
    name="deepseek_bake_off",
    title="DeepSeekMoE table 1 in miniature",
    base=language_model,
    arms={
        "dense": {"model.moe.every": 0},
        "hash": _MOE | {"model.moe.router": router("hash")},
        "switch": _MOE | {"model.moe.router": _TOP1},
        "gshard": _MOE | {"model.moe.router": _TOP2},
        "fine": _FINE,
    },
    scales=SCALES,
    published=(
        Published(
            "DeepSeekMoE table 1 (2401.06066)",
            "2B parameters, 16 experts' worth, 100B tokens; every layer",
            "Pile loss in nats",
            {"dense": 2.060, "hash": 1.932, "switch": 1.881, "gshard": 1.867, "fine": 1.808},
            measures="loss",
        ),
    ),
    claims=(
        Claim("Hash is better than dense", "loss", "hash", "dense"),
        Claim("Learned is better than hash", "loss", "switch", "hash"),
        Claim("Top-2 is better than top-1", "loss", "gshard", "switch"),
        Claim("Fine-grained and shared is better than GShard", "loss", "fine", "gshard"),
    ),
)

get_config = ABLATION.get_config
