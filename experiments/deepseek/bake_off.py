"""DeepSeekMoE table 1: dense, hash, Switch, GShard, and fine-grained experts with a shared expert.

The last two arms are not in the paper. They test how much of the differences is due to the size of
the gates: the gate of hash is 1, GShard's two gates sum to 1, and raw gates start at about
``1 / E``.
"""

from moe_jax.configs.common import router
from moe_jax.experiments.base import DROPLESS, REGISTERED, balanced, beats_zlib, saturated_model

from moe_jax.ablation.ablation import Ablation, Claim, Published

# As in the paper, no token is dropped, and every balance loss has the weight 0.01. The loss of
# top-2 is a sum over both choices, so its weight is half as large.
_MOE = DROPLESS | {"model.moe.num_experts": 16}
_TOP1 = router("olmoe", k=1, balance_weight=0.01, z_weight=0.0)
_TOP2 = router("mixtral", k=2, balance_weight=0.005)
_WIDER = {"model.moe.expert_dim": lambda config: 3 * config.model.mlp_dim // 2}
_FINE = DROPLESS | {
    "model.moe.num_experts": 63,
    "model.moe.expert_dim": lambda config: config.model.mlp_dim // 4,
    "model.moe.shared.hidden": lambda config: config.model.mlp_dim // 4,
    # The balance loss is computed over a group, here the whole batch, as in the other arms.
    "model.moe.router": router("deepseek_moe", k=7, balance_weight=0.01, span="group"),
}


ABLATION = Ablation(
    name="deepseek_bake_off",
    title="DeepSeekMoE table 1: comparison of routers",
    base=saturated_model,
    arms={
        "dense": {"model.moe.every": 0},
        "hash": _MOE | {"model.moe.router": router("hash")},
        "switch": _MOE | {"model.moe.router": _TOP1},
        "gshard": _MOE | {"model.moe.router": _TOP2},
        "fine": _FINE,
        "gshard_1.5": _MOE | _WIDER | {"model.moe.router": _TOP2},
        "switch_times_16": _MOE | balanced(1, 0.01, scale=16.0),
        "fine_normalised": _FINE | balanced(7, 0.01, normalize=True),
    },
    scales=REGISTERED,
    seeds=12,
    registered="dc57d6faa22382212a04ba26a7f1fd9334ff4c1e",
    published=(
        Published(
            "DeepSeekMoE table 1 (2401.06066)",
            "2B parameters, experts as large as 16 FFNs in every layer, 100B tokens",
            "Pile loss in nats",
            {
                "dense": 2.060,
                "hash": 1.932,
                "switch": 1.881,
                "gshard": 1.867,
                "fine": 1.808,
                "gshard_1.5": 1.808,
            },
            measures="loss",
        ),
    ),
    claims=(
        Claim("A hash router has a lower loss than a dense model", "loss", "hash", "dense"),
        Claim("Switch has a lower loss than a hash router", "loss", "switch", "hash"),
        Claim("GShard's top-2 has a lower loss than Switch", "loss", "gshard", "switch"),
        Claim(
            "Fine-grained and shared experts have a lower loss than GShard",
            "loss",
            "fine",
            "gshard",
        ),
        Claim(
            "Gates that start at 1 lower the loss of Switch (ours)",
            "loss",
            "switch_times_16",
            "switch",
        ),
        Claim(
            "Switch with gates that start at 1 has a lower loss than hash (ours)",
            "loss",
            "switch_times_16",
            "hash",
        ),
        Claim(
            "Normalised gates lower the loss of fine-grained experts (ours)",
            "loss",
            "fine_normalised",
            "fine",
        ),
        Claim(
            "Fine-grained with normalised gates has a lower loss than GShard (ours)",
            "loss",
            "fine_normalised",
            "gshard",
        ),
    ),
    notes=(
        "Two runs of the first look were paused while they trained, and their seconds include the "
        "pause.",
    ),
    gates=(
        beats_zlib(),
        Claim("top-2 has a lower loss than a dense model", "loss", "gshard", "dense"),
    ),
)

get_config = ABLATION.get_config
