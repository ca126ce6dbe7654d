"""Specialisation of experts on domains: synthetic languages with a known best possible loss.

Each row is one document, so that the model reads it whole and can reach the best possible loss.
Expert choice is left out, because it leaks later tokens in a causal model.
"""

from typing import Any

from ml_collections import ConfigDict
from moe_jax.configs.common import router
from moe_jax.experiments.base import DROPLESS, SCALES, balanced, language_model

from moe_jax.ablation.ablation import Ablation, Claim

_INFORMATION = "mutual_information"
_LENGTHS = {"cpu": 128, "gpu": 512, "pod": 512}
# The load is balanced over many texts, so that all tokens of a text may choose one expert.
_GROUPS = {"cpu": 2048, "gpu": 4096, "pod": 4096}


def _base() -> ConfigDict:
    config = language_model()
    config.data.update(source="mixture", tokenizer="bytes", packing=False)
    config.data.mixture.update(num_languages=8, num_documents=2**16)
    return config


def _sizes(scale: str) -> dict[str, Any]:
    # A document and its end token fill a row.
    length = _LENGTHS[scale]
    return SCALES[scale] | {
        "data.source": "mixture",
        "data.seq_length": length,
        "data.eval_documents": None,
        "data.mixture.document_length": length - 1,
        "model.moe.group_size": _GROUPS[scale],
    }


def _top(k: int, balance_weight: float = 1e-2) -> dict[str, Any]:
    # The balance loss of Switch; no token is dropped, as in the arms hash and bias.
    chosen = router("olmoe", k=k, balance_weight=balance_weight, z_weight=0.0)
    return DROPLESS | {"model.moe.router": chosen}


ABLATION = Ablation(
    name="specialisation_domains",
    title="Specialisation of experts on known domains",
    base=_base,
    arms={
        "dense": {"model.moe.every": 0},
        "hash": DROPLESS | {"model.moe.router": router("hash")},
        "top1": _top(1),
        "top2": _top(2),
        "sigmoid": balanced(1, 1e-2, "Sigmoid", per_token=True),
        "bias": DROPLESS | {"model.moe.router": router("loss_free", k=1)},
        "sequence": _top(1) | {"model.moe.group_size": lambda config: config.data.seq_length},
        "unbalanced": _top(1, balance_weight=0.0),
    },
    scales={scale: _sizes(scale) for scale in SCALES},
    metric="mutual_information",
    claims=(
        Claim(
            "Experts of top-1 tell more about the domain than experts of hash (ours)",
            _INFORMATION,
            "hash",
            "top1",
        ),
        Claim(
            "Experts of top-2 tell more about the domain than experts of hash (ours)",
            _INFORMATION,
            "hash",
            "top2",
        ),
        Claim(
            "Experts of bias balancing tell more about the domain than experts of hash (ours)",
            _INFORMATION,
            "hash",
            "bias",
        ),
        Claim(
            "Experts specialise more with bias balancing than with a balance loss",
            _INFORMATION,
            "sigmoid",
            "bias",
            paper="DeepSeek-V3 (2412.19437) section 4.5.3, figure only",
        ),
        Claim(
            "Experts specialise more if balanced over many texts than within each text",
            _INFORMATION,
            "sequence",
            "top1",
            paper="Qiu et al. 2025 (2501.11873), in words",
        ),
        Claim(
            "Experts without balancing tell less about the domain (ours)",
            _INFORMATION,
            "unbalanced",
            "top1",
        ),
        Claim(
            "Experts of top-1 have a higher purity than experts of hash (ours)",
            "purity",
            "hash",
            "top1",
        ),
        Claim(
            "Top-1 is nearer to the best possible loss than hash (ours)",
            "excess_loss",
            "top1",
            "hash",
        ),
        Claim(
            "Top-1 is nearer to the best possible loss than a dense model (ours)",
            "excess_loss",
            "top1",
            "dense",
        ),
    ),
    notes=(
        "In these languages the next symbol depends only on the current symbol. An expert of "
        "the hash router always gets the same symbols and has to learn only their rows of the "
        "transition matrices, so hash is a strong router here. Its experts carry no more "
        "information about the language than the symbols do.",
    ),
)

get_config = ABLATION.get_config
