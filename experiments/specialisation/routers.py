"""Specialisation of Switch, GLaM and expert choice on known domains, and spans of the balance loss.

The domains are eight synthetic languages; a row is one text. Expert choice takes the whole batch as
its group and sees later tokens in this causal model, so no claim reads its loss. The arms
``batch``, ``sequence`` and ``bias`` have two experts per token like GLaM and drop no token.
"""

from typing import Any

from ml_collections import ConfigDict
from moe_jax.configs.common import router
from moe_jax.experiments.base import DROPLESS, REGISTERED, beats_zlib, saturated_model
from moe_jax.experiments.glam import experts

from moe_jax.ablation.ablation import Ablation, Claim, Published

_INFORMATION, _PURITY = "mutual_information", "purity"
_HALF = {"model.moe.expert_dim": lambda config: config.model.mlp_dim // 2}
_QIU = "Qiu et al. 2025 (2501.11873), in words"


def _base() -> ConfigDict:
    config = saturated_model()
    config.data.update(tokenizer="bytes", packing=False)
    config.data.mixture.update(num_languages=8, num_documents=2**16)
    return config


def _sizes(scale: str) -> dict[str, Any]:
    sizes = REGISTERED[scale]
    # A text and its end token fill a row.
    length = sizes["data.seq_length"] - 1
    return sizes | {
        "data.source": "mixture",
        "data.mixture.document_length": length,
        "data.eval_documents": 1024,
    }


def _balanced(span: str) -> dict[str, Any]:
    loss = {"type": "LoadBalance", "weight": 1e-2, "choices": "mean", "span": span}
    parts = {
        "score": {"type": "Softmax"},
        "select": {"type": "TopK", "k": 2, "normalize": True},
        "balance": [loss],
        "capacity": {"dropless": "always"},
    }
    return _HALF | DROPLESS | {"model.moe.router": ConfigDict(parts)}


ABLATION = Ablation(
    name="specialisation_routers",
    title="Specialisation of Switch, GLaM and expert choice on known domains",
    base=_base,
    arms={
        "hash": DROPLESS | {"model.moe.router": router("hash")},
        "switch": {"model.moe.router": router("switch")},
        "glam": experts.ABLATION.arms["e16"],
        "expert_choice": _HALF
        | {
            "model.moe.router": router(
                "expert_choice", capacity_factor=2.0, eval_capacity_factor=2.0
            ),
            "model.moe.allow_future_leak": True,
        },
        "batch": _balanced("group"),
        "sequence": _balanced("sequence"),
        "bias": _HALF | DROPLESS | {"model.moe.router": router("loss_free", k=2)},
    },
    scales={scale: _sizes(scale) for scale in REGISTERED},
    seeds=12,
    registered="cabc9ac7f147bf6974cecd7175c0fffb31efdd86",
    metric=_INFORMATION,
    published=(
        Published(
            "DeepSeek-V3 section 4.5.3 (2412.19437)",
            "1B parameters; balance in each sequence, by a bias, in each batch",
            "validation loss in nats",
            {"sequence": 2.258, "bias": 2.253, "batch": 2.253},
            measures="loss",
        ),
    ),
    claims=(
        Claim(
            "Experts specialise more if balanced over the batch than within each sequence",
            _INFORMATION,
            "sequence",
            "batch",
            paper=_QIU,
        ),
        Claim(
            "A balance over the batch has a lower loss than one within each sequence",
            "loss",
            "batch",
            "sequence",
            paper=_QIU,
        ),
        Claim(
            "Experts specialise more with a bias than with a loss within each sequence",
            _INFORMATION,
            "sequence",
            "bias",
            paper="DeepSeek-V3 (2412.19437) section 4.5.3, figure only",
        ),
        Claim(
            "Experts of GLaM tell about as little of the language as experts of hash",
            _INFORMATION,
            "hash",
            "glam",
            0.05,
            True,
            paper="ST-MoE (2202.08906), experts of a multilingual model; in words",
        ),
        Claim(
            "Experts of Switch tell more of the language than experts of hash (ours)",
            _INFORMATION,
            "hash",
            "switch",
        ),
        Claim(
            "Experts of expert choice tell more of the language than experts of hash (ours)",
            _INFORMATION,
            "hash",
            "expert_choice",
        ),
        Claim(
            "Experts of expert choice tell more of the language than experts of GLaM (ours)",
            _INFORMATION,
            "glam",
            "expert_choice",
        ),
        Claim(
            "Experts of Switch have a higher purity than experts of GLaM (ours)",
            _PURITY,
            "glam",
            "switch",
        ),
        Claim(
            "GLaM is nearer to the best possible loss than Switch (ours)",
            "excess_loss",
            "glam",
            "switch",
        ),
    ),
    notes=(
        "The next symbol of a language depends on the present symbol alone. An expert of the hash "
        "router has the same symbols at all times, so its experts tell as much of the language as "
        "the symbols do.",
        "Groups have 2,048 tokens, so the arm `batch` balances over the whole batch.",
    ),
    gates=(beats_zlib("glam"),),
)

get_config = ABLATION.get_config
