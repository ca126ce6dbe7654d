"""Compares the quickstart with its baselines, and its variants with each other.

``python -m tools.quickstart --workdir=runs/variants`` trains the variants dense, Switch and GShard
of ``configs/quickstart.py`` for each seed, at equal FLOPs per token and equal steps. A seed fixes
the order of the data and the initial weights that the variants share. Finished runs are not
repeated. The tool reads the finished run of ``make train`` from ``--quickstart`` and writes
``report.md`` and ``results.json``, with the training loss of that run smoothed over 25 steps.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from moe_jax.ablation.intervals import paired_difference
from moe_jax.cli import common
from moe_jax.files import write_json
from moe_jax.run.workdir import RESULT
from moe_jax.training.metrics import read_metrics

VARIANTS = ("dense", "switch", "gshard")
_SMOOTHED = 25


def train(variant: str, seed: int, steps: int, workdir: Path) -> dict[str, Any]:
    """Trains one variant, unless its run is finished, and returns its result."""
    folder = workdir / f"{variant}-seed{seed}-steps{steps}"
    command = [sys.executable, "-m", "moe_jax.train", f"--config=configs/quickstart.py:{variant}"]
    command += [f"--workdir={folder}", f"--config.training.steps={steps}"]
    command += [f"--config.training.seed={seed}", f"--config.data.seed={seed}"]
    subprocess.run(command, check=True)
    return json.loads((folder / RESULT).read_text())


def quickstart_report(result: dict[str, Any]) -> str:
    """Returns a Markdown table of one finished run and its baselines."""
    tokens, seconds = result["tokens"], result["seconds"]
    lines = [
        f"`make train`: {result['steps']} steps, {tokens:,} tokens, {seconds:.0f} s with data",
        f"preparation, compilation, evaluation and report, on {result['device']}.",
        "",
        "| | bits per byte |",
        "|---|---|",
        f"| **quickstart (Switch, {result['total_parameters']:,} parameters)** "
        f"| **{result['bits_per_byte']:.3f}** |",
    ]
    names = {"zlib": "zlib -9, file by file", "order2": "order-2 byte model", "uniform": "uniform"}
    lines += [f"| {text} | {result['baselines'][name]:.3f} |" for name, text in names.items()]
    return "\n".join([*lines, ""])


def training_curve(lines: Iterable[dict[str, Any]]) -> list[dict[str, float]]:
    """Returns the loss and gradient norm of a run, averaged over each ``_SMOOTHED`` steps.

    Args:
        lines: Lines of ``metrics.jsonl``.
    """
    parts: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        if line["kind"] == "train":
            parts.setdefault(-(-line["step"] // _SMOOTHED), []).append(line)
    return [
        {
            "step": number * _SMOOTHED,
            **{key: float(np.mean([line[key] for line in part])) for key in ("loss", "grad_norm")},
        }
        for number, part in sorted(parts.items())
    ]


def largest_climb(values: Sequence[float]) -> float:
    """Returns the largest rise of a curve above its lowest earlier value."""
    return float(np.max(np.asarray(values) - np.minimum.accumulate(values)))


def curve_report(curve: Sequence[dict[str, float]]) -> str:
    """Returns the training curve at a few steps, as Markdown."""
    shown = curve[3::4]
    climb = largest_climb([point["loss"] for point in curve])
    lines = [
        f"Training loss in nats per token, as means over {_SMOOTHED} steps. It never rises more",
        f"than {climb:.2f} above its lowest earlier value.",
        "",
        "| step | " + " | ".join(str(point["step"]) for point in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
        "| loss | " + " | ".join(f"{point['loss']:.2f}" for point in shown) + " |",
        "| gradient norm | " + " | ".join(f"{point['grad_norm']:.2f}" for point in shown) + " |",
    ]
    return "\n".join([*lines, ""])


def report(results: dict[str, list[dict[str, Any]]], steps: int) -> str:
    """Returns the Markdown table of all variants."""
    bits = {name: [run["bits_per_byte"] for run in runs] for name, runs in results.items()}
    seeds = len(bits["dense"])
    lines = [
        f"{steps} steps, {seeds} paired seeds, validation bits per byte (lower is better). The",
        "last column is the mean difference to the dense model by seed, with its 95 % interval.",
        "",
        "| variant | parameters | FLOPs per token | bits per byte, by seed | minus dense |",
        "|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        scores = " ".join(f"{value:.3f}" for value in bits[name])
        difference = "" if name == "dense" else str(paired_difference(bits[name], bits["dense"]))
        size, flops = runs[0]["total_parameters"], runs[0]["flops_per_token"]
        lines.append(f"| {name} | {size:,} | {flops:,} | {scores} | {difference} |")
    both = paired_difference(bits["gshard"], bits["switch"])
    return "\n".join([*lines, "", f"GShard minus Switch: {both}.", ""])


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", "runs/variants", "Folder of the runs.", flag_values=values)
    flags.DEFINE_string("quickstart", "runs/quickstart", "Run of `make train`.", flag_values=values)
    flags.DEFINE_string(
        "output", "experiments/results/quickstart", "Folder of the results.", flag_values=values
    )
    flags.DEFINE_integer(
        "seeds", 3, "Number of seeds per variant.", lower_bound=2, flag_values=values
    )
    flags.DEFINE_integer(
        "steps", 150, "Number of steps per run.", lower_bound=1, flag_values=values
    )


def main(given: flags.FlagValues) -> None:
    """Trains the missing runs and writes the results."""
    steps, output = given.steps, Path(given.output)
    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for seed in range(given.seeds):
        for variant in VARIANTS:
            results[variant].append(train(variant, seed, steps, Path(given.workdir)))
    quickstart = json.loads((Path(given.quickstart) / RESULT).read_text())
    fields = ("bits_per_byte", "loss", "accuracy", "total_parameters", "flops_per_token")
    small = {
        name: [{key: run[key] for key in fields} for run in runs] for name, runs in results.items()
    }
    curve = training_curve(read_metrics(Path(given.quickstart)))
    everything = {"quickstart": quickstart, "curve": curve, "steps": steps, "variants": small}
    write_json(output / "results.json", everything)
    parts = (quickstart_report(quickstart), curve_report(curve), report(results, steps))
    text = "\n".join(parts)
    (output / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    common.run(define, main)
