"""ST-MoE table 16: an additional dense sub-layer before or after each MoE layer.

The dense model with additional sub-layers has one expert per MoE layer. Every token chooses it with
gate 1, so it is a dense layer, and the additional sub-layers are in the same layers.
"""

from moe_jax.configs.common import router
from moe_jax.experiments.base import SCALES, language_model

from moe_jax.ablation.ablation import Ablation, Claim, Published


def _sparse(extra: str) -> dict:
    return {"model.moe.router": router("st_moe"), "model.moe.extra_dense": extra}


_DENSE_EXTRA = {
    "model.moe.num_experts": 1,
    "model.moe.router": router("olmoe", k=1, balance_weight=0.0, z_weight=0.0),
    "model.moe.extra_dense": "after",
}

ABLATION = Ablation(
    name="st_moe_sparse_dense",
    title="ST-MoE table 16: sparse-dense stacking",
    base=language_model,
    arms={
        "dense": {"model.moe.every": 0},
        "dense_extra": _DENSE_EXTRA,
        "sparse": _sparse("none"),
        "sparse_before": _sparse("before"),
        "sparse_after": _sparse("after"),
    },
    scales=SCALES,
    published=(
        Published(
            "ST-MoE table 16 (2202.08906)",
            "FLOPs of T5-Large, 32 experts, C4, 100k steps",
            "negative log perplexity in nats",
            {
                "dense": -1.474,
                "dense_extra": -1.452,
                "sparse": -1.383,
                "sparse_before": -1.369,
                "sparse_after": -1.369,
            },
            measures="loss",
            negated=True,
        ),
    ),
    claims=(
        Claim(
            "A sparse model has a lower loss than a dense model (.091)", "loss", "sparse", "dense"
        ),
        Claim(
            "A dense sub-layer after the experts lowers the loss (.014)",
            "loss",
            "sparse_after",
            "sparse",
        ),
        Claim(
            "A dense sub-layer before the experts lowers the loss (.014)",
            "loss",
            "sparse_before",
            "sparse",
        ),
        Claim(
            "Dense sub-layers before and after the experts have about the same loss",
            "loss",
            "sparse_before",
            "sparse_after",
            0.02,
            True,
        ),
        Claim(
            "An extra dense sub-layer lowers the loss of a dense model (.022)",
            "loss",
            "dense_extra",
            "dense",
        ),
    ),
)

get_config = ABLATION.get_config
