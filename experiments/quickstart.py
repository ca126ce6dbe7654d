"""The quickstart beside its baselines, and its variants beside each other.

``python -m experiments.quickstart --workdir=runs/variants`` trains dense twin, Switch and GShard
of ``configs/quickstart.py``, at equal FLOPs per token and equal steps, for each seed. A seed fixes
the initial weights that variants share and the order of the data. Finished runs are not repeated.
With the finished run of ``make train`` in ``--quickstart``, it writes ``results.json`` and
``report.md``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.statistics import paired_difference
from moe_jax.workdir import RESULT, write_json

VARIANTS = ("dense", "switch", "gshard")


def train(variant: str, seed: int, steps: int, workdir: Path) -> dict[str, Any]:
    """Trains one variant, or finds it trained, and returns its result."""
    folder = workdir / f"{variant}-seed{seed}-steps{steps}"
    command = [sys.executable, "-m", "moe_jax.train", f"--config=configs/quickstart.py:{variant}"]
    command += [f"--workdir={folder}", f"--config.training.steps={steps}"]
    command += [f"--config.training.seed={seed}", f"--config.data.seed={seed}"]
    subprocess.run(command, check=True)
    return json.loads((folder / RESULT).read_text())


def quickstart_report(result: dict[str, Any]) -> str:
    """Returns the table of one finished run beside its baselines, as Markdown."""
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


def report(results: dict[str, list[dict[str, Any]]], steps: int) -> str:
    """Returns the table as Markdown."""
    bits = {name: [run["bits_per_byte"] for run in runs] for name, runs in results.items()}
    seeds = len(bits["dense"])
    lines = [
        f"{steps} steps, {seeds} paired seeds, validation bits per byte (lower is better); the",
        "difference to the dense twin is by seed, with its 95 % confidence interval (Student's t).",
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


def main(_: list[str]) -> None:
    """Runs what is missing and writes the results."""
    steps, output = _STEPS.value, Path(_OUTPUT.value)
    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for seed in range(_SEEDS.value):
        for variant in VARIANTS:
            results[variant].append(train(variant, seed, steps, Path(_WORKDIR.value)))
    quickstart = json.loads((Path(_QUICKSTART.value) / RESULT).read_text())
    kept = ("bits_per_byte", "loss", "accuracy", "total_parameters", "flops_per_token")
    small = {
        name: [{key: run[key] for key in kept} for run in runs] for name, runs in results.items()
    }
    everything = {"quickstart": quickstart, "steps": steps, "variants": small}
    write_json(output / "results.json", everything)
    text = quickstart_report(quickstart) + "\n" + report(results, steps)
    (output / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    # Here and not above: a module that is imported must not take the name of a flag.
    _WORKDIR = flags.DEFINE_string("workdir", "runs/variants", "Folder of the runs.")
    _QUICKSTART = flags.DEFINE_string("quickstart", "runs/quickstart", "Run of `make train`.")
    _OUTPUT = flags.DEFINE_string(
        "output", "experiments/results/quickstart", "Folder of the results."
    )
    _SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds per variant.", lower_bound=2)
    _STEPS = flags.DEFINE_integer("steps", 150, "Steps per run.", lower_bound=1)
    app.run(main)
