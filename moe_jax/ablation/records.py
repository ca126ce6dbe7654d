"""Measurements of a run: the line of ``results.jsonl``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_jax.ablation.runner import Run

_POINTS = 100
# Versions in a record; the source ``python_library`` reads the library of this Python version.
_VERSIONS = ("python", "jax")


def _late(run: Run, read: Callable[[dict[str, Any]], float]) -> float:
    """Returns the mean over the second half of training."""
    lines = _finite(run.lines)
    return float(np.mean([read(line) for line in lines[len(lines) // 2 :]]))


def _finite(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the lines without skipped steps; the log has ``null`` for a non-finite loss."""
    return [line for line in lines if line["loss"] is not None]


def _over_layers(name: str) -> Callable[[Run], float | None]:
    """Returns a reader of the mean over MoE layers and the second half of training.

    The reader returns ``None`` for a dense model.
    """

    def read(run: Run) -> float | None:
        if not run.result["layers"]:
            return None
        return _late(run, lambda line: float(np.mean([layer[name] for layer in line["layers"]])))

    return read


def _eval_violation(run: Run) -> float | None:
    layers = run.result["layers"]
    return float(np.mean([layer["max_violation"] for layer in layers])) if layers else None


def _of_domains(name: str) -> Callable[[Run], float | None]:
    """Returns a reader of the mean over MoE layers of a score on text of known domains.

    The reader returns ``None`` for text without domains.
    """

    def read(run: Run) -> float | None:
        layers = run.result.get("specialisation", {}).get("layers")
        return float(np.mean([layer[name] for layer in layers])) if layers else None

    return read


def _speed(run: Run) -> float:
    # The time of the first line includes compilation.
    return float(np.median([line["tokens_per_second"] for line in run.lines[1:] or run.lines]))


def _excess_loss(run: Run) -> float | None:
    best = run.result.get("best_possible_loss")
    return None if best is None else run.result["loss"] - best


def _bits_above_zlib(run: Run) -> float | None:
    zlib = run.result.get("baselines", {}).get("zlib")
    return None if zlib is None else run.result["bits_per_byte"] - zlib


# A metric is ``None`` if it does not apply to a run.
METRICS: dict[str, Callable[[Run], float | None]] = {
    "loss": lambda run: run.result["loss"],
    "best_loss": lambda run: min((line["loss"] for line in _finite(run.evaluations)), default=None),
    "bits_per_byte": lambda run: run.result["bits_per_byte"],
    "bits_above_zlib": _bits_above_zlib,
    "train_loss": lambda run: _late(run, lambda line: line["loss"]),
    "dropped": lambda run: _late(run, lambda line: line["dropped_fraction"]),
    "eval_dropped": lambda run: run.result["dropped_fraction"],
    "mutual_information": _of_domains("mutual_information"),
    "purity": _of_domains("purity"),
    "excess_loss": _excess_loss,
    "max_violation": _over_layers("max_violation"),
    "eval_violation": _eval_violation,
    "load_entropy": _over_layers("load_entropy"),
    "tokens_per_second": _speed,
    "step_seconds": lambda run: run.experiment.tokens_per_step / _speed(run),
}


def record(run: Run) -> dict[str, Any]:
    """Returns the line of ``results.jsonl`` for a run that has ended.

    Steps, tokens and FLOPs count the whole planned run. The line of a diverged run has no metrics;
    its ``diverged`` is the last step before the divergence.
    """
    result, about = run.result, run.about
    return {
        "arm": run.arm,
        "seed": run.seed,
        "scale": run.scale,
        "config": run.folder.name,
        "parameters": run.cost.total,
        "flops_per_token": run.cost.flops_per_token,
        "training_flops": run.training_flops,
        "steps": run.experiment.training.steps,
        "tokens": run.tokens,
        "seconds": result["seconds"],
        "device": result["device"],
        "commit": about["git_commit"],
        **_of_corpus(about),
        "versions": {name: about["versions"][name] for name in _VERSIONS},
        # Bits per byte of simple models on the validation text, such as zlib.
        "baselines": result.get("baselines", {}),
        **({"diverged": result["step"]} if run.diverged else _measured(run)),
        "curve": _curve(run.lines),
        **_validations(run),
    }


def _validations(run: Run) -> dict[str, list[list[float]]]:
    """Returns step and validation loss of every validation, if there is one during training."""
    points = [[line["step"], line["loss"]] for line in run.evaluations if line["loss"] is not None]
    return {"eval_curve": points} if len(points) > 1 else {}


def _of_corpus(about: dict[str, Any]) -> dict[str, str]:
    """Returns the SHA-256 of the corpus of a run; runs of older versions recorded none."""
    return {"corpus": about["corpus"]["sha256"]} if "corpus" in about else {}


def _measured(run: Run) -> dict[str, Any]:
    metrics = {name: value for name, read in METRICS.items() if (value := read(run)) is not None}
    # Share of the validation slots of each expert, by MoE layer.
    load = [[round(share, 5) for share in layer["load"]] for layer in run.result["layers"]]
    return {**metrics, "load": load}


def _curve(lines: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Returns about ``_POINTS`` points of the training loss, each the mean since the previous."""
    width = max(len(lines) // _POINTS, 1)
    parts = [_finite(lines[start : start + width]) for start in range(0, len(lines), width)]
    return [[part[-1]["step"], _mean_loss(part)] for part in parts if part]


def _mean_loss(lines: Sequence[dict[str, Any]]) -> float:
    return float(np.mean([line["loss"] for line in lines]))
