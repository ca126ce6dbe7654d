"""Loss-free balancing table 2: a bias on the ranking instead of a balance loss.

All arms have sigmoid gates and differ only in the method of balancing.
"""

import math

from moe_jax.configs.common import router
from moe_jax.experiments.base import DROPLESS, SCALES, balanced, language_model

from moe_jax.ablation.ablation import Ablation, Claim, Published

_FINE = DROPLESS | {
    "model.moe.num_experts": 16,
    "model.moe.expert_dim": lambda config: config.model.mlp_dim // 4,
}

_PERPLEXITY = "Wang et al. table 2, log of the perplexities 9.56 and 9.50"

ABLATION = Ablation(
    name="deepseek_loss_free",
    title="Loss-free balancing",
    base=language_model,
    arms={
        "loss": _FINE | balanced(4, 1e-3, "Sigmoid", per_token=True),
        "bias": _FINE | {"model.moe.router": router("loss_free", k=4, bias_rate=1e-3)},
        "fast_bias": _FINE | {"model.moe.router": router("loss_free", k=4, bias_rate=1e-2)},
    },
    scales=SCALES,
    metric="eval_violation",
    published=(
        Published(
            "Wang et al. table 2 (2408.15664)",
            "1B parameters, 100B tokens",
            "MaxVio over the validation set",
            {"loss": 0.72, "bias": 0.04},
            measures="eval_violation",
        ),
        Published(
            "Wang et al. table 2 (2408.15664), log of the perplexity",
            "1B parameters, 100B tokens",
            "validation loss in nats",
            {"loss": math.log(9.56), "bias": math.log(9.50)},
            measures="loss",
        ),
    ),
    claims=(
        Claim(
            "A bias gives a more even load over validation than a balance loss",
            "eval_violation",
            "bias",
            "loss",
        ),
        Claim(
            "A bias gives a more even load in each batch (ours)", "max_violation", "bias", "loss"
        ),
        Claim("A faster bias gives a more even load (ours)", "eval_violation", "fast_bias", "bias"),
        Claim(
            "A bias gives a lower loss than a balance loss",
            "loss",
            "bias",
            "loss",
            published=0.006,
            paper=_PERPLEXITY,
        ),
        Claim(
            "A bias and a balance loss give about the same loss",
            "loss",
            "bias",
            "loss",
            0.02,
            True,
            published=0.006,
            paper=_PERPLEXITY,
        ),
    ),
)

get_config = ABLATION.get_config
