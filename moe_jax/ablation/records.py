"""What is measured of a run: the line of ``results.jsonl``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_jax.ablation.runner import Run

_POINTS = 100
# Of these: the first is the library that source `python_library` reads, too.
_VERSIONS = ("python", "jax")


def _late(run: Run, read: Callable[[dict[str, Any]], float]) -> float:
    """Mean over the second half of training."""
    lines = _finite(run.lines)
    return float(np.mean([read(line) for line in lines[len(lines) // 2 :]]))


def _finite(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leaves out steps that were skipped; what is not finite is none in the log."""
    return [line for line in lines if line["loss"] is not None]


def _over_layers(name: str) -> Callable[[Run], float | None]:
    """Mean over MoE layers, over the second half of training; none for a dense model."""

    def read(run: Run) -> float | None:
        if not run.result["layers"]:
            return None
        return _late(run, lambda line: float(np.mean([layer[name] for layer in line["layers"]])))

    return read


def _eval_violation(run: Run) -> float | None:
    layers = run.result["layers"]
    return float(np.mean([layer["max_violation"] for layer in layers])) if layers else None


def _of_domains(name: str) -> Callable[[Run], float | None]:
    """Mean over MoE layers of a score on text of known domains; none of other text."""

    def read(run: Run) -> float | None:
        layers = run.result.get("specialisation", {}).get("layers")
        return float(np.mean([layer[name] for layer in layers])) if layers else None

    return read


def _speed(run: Run) -> float:
    # The first line's time has compilation in it.
    return float(np.median([line["tokens_per_second"] for line in run.lines[1:] or run.lines]))


def _excess_loss(run: Run) -> float | None:
    best = run.result.get("best_possible_loss")
    return None if best is None else run.result["loss"] - best


# None where a run has no such thing.
METRICS: dict[str, Callable[[Run], float | None]] = {
    "loss": lambda run: run.result["loss"],
    "best_loss": lambda run: min(line["loss"] for line in run.evaluations),
    "bits_per_byte": lambda run: run.result["bits_per_byte"],
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

    Steps, tokens and FLOPs are those of a whole run. One that diverged has no metrics, and
    ``diverged``, the last step before that.
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
        **({"diverged": result["step"]} if run.diverged else _measured(run)),
        "curve": _curve(run.lines),
    }


def _of_corpus(about: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 of the text that a run read; runs of older versions recorded none."""
    return {"corpus": about["corpus"]["sha256"]} if "corpus" in about else {}


def _measured(run: Run) -> dict[str, Any]:
    metrics = {name: value for name, read in METRICS.items() if (value := read(run)) is not None}
    # What share of validation's slots each expert takes, by MoE layer.
    load = [[round(share, 5) for share in layer["load"]] for layer in run.result["layers"]]
    return {**metrics, "load": load}


def _curve(lines: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Returns training loss by step, each the mean since the one before; few enough to commit."""
    width = max(len(lines) // _POINTS, 1)
    parts = [_finite(lines[start : start + width]) for start in range(0, len(lines), width)]
    return [[part[-1]["step"], _mean_loss(part)] for part in parts if part]


def _mean_loss(lines: Sequence[dict[str, Any]]) -> float:
    return float(np.mean([line["loss"] for line in lines]))
