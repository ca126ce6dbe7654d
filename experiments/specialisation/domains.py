"""Which routers find out the domain of a text: languages that are known, and the best loss too.

Each row is one document, so that the best possible loss is that of a model which reads it whole.
Expert choice is left out: in a causal model it reads the future.
"""

from typing import Any

from ml_collections import ConfigDict
from moe_jax.configs.common import router
from moe_jax.experiments.base import DROPLESS, SCALES, balanced, language_model

from moe_jax.ablation.ablation import Ablation, Claim

_INFORMATION = "mutual_information"
_LENGTHS = {"cpu": 128, "gpu": 512, "pod": 512}
# Tokens that are balanced together: many texts, so that balance lets one prefer an expert.
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
    # The balance loss of Switch and nothing dropped, as with hash and bias.
    chosen = router("olmoe", k=k, balance_weight=balance_weight, z_weight=0.0)
    return DROPLESS | {"model.moe.router": chosen}


ABLATION = Ablation(
    name="specialisation_domains",
    title="Specialisation: experts against known domains",
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
            "Experts of top-1 tell more about the domain than those of hash (ours)",
            _INFORMATION,
            "hash",
            "top1",
        ),
        Claim(
            "Experts of top-2 tell more about the domain than those of hash (ours)",
            _INFORMATION,
            "hash",
            "top2",
        ),
        Claim(
            "Experts of bias balancing tell more about the domain than those of hash (ours)",
            _INFORMATION,
            "hash",
            "bias",
        ),
        Claim(
            "Experts of bias balancing specialise more than those of a balance loss",
            _INFORMATION,
            "sigmoid",
            "bias",
            paper="DeepSeek-V3 (2412.19437) section 4.5.3, figure only",
        ),
        Claim(
            "Experts balanced over many texts specialise more than within each text",
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
            "Experts of top-1 have a higher purity than those of hash (ours)",
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
        "In these languages the next symbol depends on the last symbol alone. A hash of the "
        "symbol gives each expert a few rows of the table of every language, which makes hash "
        "a strong router here. Its experts tell about the language only what the symbol tells.",
    ),
)

get_config = ABLATION.get_config
