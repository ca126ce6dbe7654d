"""Loss-free balancing table 2: a bias on the ranking instead of a balance loss."""

from configs.common import router
from experiments.ablation import Ablation, Claim, Published
from experiments.base import DROPLESS, SCALES, language_model

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
        "loss": _FINE | {"model.moe.router": router("deepseek_moe", k=4, balance_weight=1e-3)},
        "bias": _FINE | {"model.moe.router": router("loss_free", k=4, bias_rate=1e-3)},
        "fast_bias": _FINE | {"model.moe.router": router("loss_free", k=4, bias_rate=1e-2)},
    },
    scales=SCALES,
    metric="max_violation",
    published=(
        Published(
            "Wang et al. table 2 (2408.15664)",
            "1B parameters, 100B tokens",
            "MaxVio over the validation set (here the mean over late training batches)",
            {"loss": 0.72, "bias": 0.04},
            measures="max_violation",
        ),
    ),
    claims=(
        Claim("The bias balances better", "max_violation", "bias", "loss"),
        Claim("A faster bias balances better (ours)", "max_violation", "fast_bias", "bias"),
        Claim("and the loss is lower", "loss", "bias", "loss", published=0.006, paper=_PERPLEXITY),
        Claim("by little", "loss", "bias", "loss", 0.02, True, published=0.006, paper=_PERPLEXITY),
    ),
)

get_config = ABLATION.get_config
