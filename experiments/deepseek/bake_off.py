"""DeepSeekMoE table 1 in miniature: dense, hash, Switch, GShard, fine-grained with a shared one.

Two arms of ours ask how much of the differences is the size of the gates. Hash multiplies by 1 and
GShard's two gates sum to 1, while raw gates start at ``1 / E`` each and must grow.
"""

from moe_jax.configs.common import router
from moe_jax.experiments.base import DROPLESS, SCALES, balanced, language_model

from moe_jax.ablation.ablation import Ablation, Claim, Published

# As in the paper nothing is dropped, and every balance loss has the weight 0.01; that of top-2 is
# a sum over both choices.
_MOE = DROPLESS | {"model.moe.num_experts": 16}
_TOP1 = router("olmoe", k=1, balance_weight=0.01, z_weight=0.0)
_TOP2 = router("mixtral", k=2, balance_weight=0.005)
_FINE = DROPLESS | {
    "model.moe.num_experts": 63,
    "model.moe.expert_dim": lambda config: config.model.mlp_dim // 4,
    "model.moe.shared.hidden": lambda config: config.model.mlp_dim // 4,
    # As in the other arms the loss is of a group, here the whole batch.
    "model.moe.router": router("deepseek_moe", k=7, balance_weight=0.01, span="group"),
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
        "switch_times_16": _MOE | balanced(1, 0.01, scale=16.0),
        "fine_normalised": _FINE | balanced(7, 0.01, normalize=True),
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
        Claim("Gates that start at 1 help top-1 (ours)", "loss", "switch_times_16", "switch"),
        Claim("With them learned is better than hash (ours)", "loss", "switch_times_16", "hash"),
        Claim("Normalised gates help fine-grained (ours)", "loss", "fine_normalised", "fine"),
        Claim(
            "With them fine-grained is better than GShard (ours)",
            "loss",
            "fine_normalised",
            "gshard",
        ),
    ),
    notes=(
        "Hash is ahead of learned routing here, and gates that start at 1 make up a fifth of it. "
        "Not tried: with a vocabulary of 512, an expert chosen by token id serves 32 tokens from "
        "the first step, which a learned router has to find out in 1000.",
        "Raw gates of seven in 63 start with a ninth of the weight that GShard's two have; "
        "normalised, fine-grained experts come nearer to GShard, whose seeds differ most.",
    ),
)

get_config = ABLATION.get_config
