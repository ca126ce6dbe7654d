"""DeepSeekMoE figures 4 and 5: trained models without their best experts, or with fewer experts.

The models are arms of ``bake_off.py``. An arm such as ``fine_without_4`` evaluates a model whose
tokens may not choose their 4 best experts; ``fine_k5`` evaluates it with 5 experts per token.
"""

from typing import Any

from moe_jax.experiments.base import REGISTERED, beats_zlib, evaluated, saturated_model
from moe_jax.experiments.deepseek import bake_off

from moe_jax.ablation.ablation import Ablation, Claim, Published
from moe_jax.config.schema import settings
from moe_jax.routing import Router, presets

_FINE, _WIDE = (bake_off.ABLATION.arms[arm] for arm in ("fine", "gshard_1.5"))
_GSHARD = bake_off.ABLATION.arms["gshard"]


def _choosing(arm: str, router: Router, **choice: int) -> dict[str, Any]:
    """Returns the settings that evaluate an arm, whose router is given, with another choice."""
    parts = settings(router)
    parts.select.update(choice)
    return bake_off.ABLATION.arms[arm] | {"model.moe.router": parts} | evaluated(arm)


_OF_FINE = presets.deepseek_moe(k=7, balance_weight=0.01, span="group")
_OF_WIDE = presets.mixtral(k=2, balance_weight=0.005)
# A sixteenth of the 63 fine-grained experts is about 4, and of GShard's 16 experts it is 1.
_WITHOUT = {
    **{f"fine_without_{n}": _choosing("fine", _OF_FINE, skip=n) for n in (4, 8, 12, 16)},
    **{f"gshard_1.5_without_{n}": _choosing("gshard_1.5", _OF_WIDE, skip=n) for n in (1, 2, 3, 4)},
}
_FEWER = {f"fine_k{k}": _choosing("fine", _OF_FINE, k=k) for k in (3, 4, 5, 6)}
_READ = "read from the figure"

ABLATION = Ablation(
    name="deepseek_removed_experts",
    title="DeepSeekMoE figures 4 and 5: removed experts",
    base=saturated_model,
    arms={"fine": _FINE, "gshard_1.5": _WIDE, "gshard": _GSHARD, **_WITHOUT, **_FEWER},
    scales=REGISTERED,
    seeds=12,
    registered="e51f927efdd154758a927de64b45a43d320d3f3f",
    published=(
        Published(
            f"DeepSeekMoE figure 4 (2401.06066), {_READ}",
            "2B parameters, 100B tokens, the best routed experts of each token disabled",
            "Pile loss in nats",
            {
                "fine": 1.8,
                "fine_without_4": 7.5,
                "fine_without_8": 8.2,
                "fine_without_12": 8.7,
                "fine_without_16": 9.1,
                "gshard_1.5": 1.8,
                "gshard_1.5_without_1": 5.6,
                "gshard_1.5_without_2": 7.5,
                "gshard_1.5_without_3": 7.6,
                "gshard_1.5_without_4": 7.7,
            },
            measures="loss",
        ),
        Published(
            f"DeepSeekMoE figure 5 (2401.06066), {_READ}",
            "2B parameters, 100B tokens, fewer experts per token in evaluation",
            "Pile loss in nats",
            {
                "fine_k3": 1.96,
                "fine_k4": 1.87,
                "fine_k5": 1.83,
                "fine_k6": 1.82,
                "fine": 1.81,
                "gshard": 1.87,
            },
            measures="loss",
        ),
    ),
    claims=(
        Claim(
            "Without a sixteenth of the best experts, fine-grained experts lose more than GShard's",
            "loss",
            "gshard_1.5_without_1",
            "fine_without_4",
        ),
        Claim(
            "Without a sixteenth of the best experts, the loss is higher",
            "loss",
            "fine",
            "fine_without_4",
        ),
        Claim(
            "Four of seven fine-grained experts have about the loss of GShard",
            "loss",
            "fine_k4",
            "gshard",
            0.01,
            True,
        ),
    ),
    gates=(
        beats_zlib("fine"),
        Claim("fine-grained has a lower loss than GShard", "loss", "fine", "gshard"),
    ),
)

get_config = ABLATION.get_config
