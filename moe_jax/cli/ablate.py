"""Runs an ablation: ``moe-jax ablate --ablation=FILE --workdir=FOLDER``.

``--ablation=experiments/switch/capacity_factor.py`` trains every arm with every seed, skips what is
finished, and writes ``results.jsonl``, ``report.md`` and figures to ``--output``. Run the same
command after an interruption to go on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from absl import flags

from moe_jax import files, signals
from moe_jax.ablation.ablation import SCALES
from moe_jax.ablation.catalogue import command_of, load
from moe_jax.ablation.intervals import MOST
from moe_jax.ablation.records import record
from moe_jax.ablation.report import write_report
from moe_jax.ablation.runner import Run, execute, runs_of, to_train
from moe_jax.cli import common
from moe_jax.config import library
from moe_jax.errors import TrainingError

# What training sustains, FLOP/s (one core at this scale, measured; the others are guesses), and
# seconds that a run takes beside it.
_RATE = {"cpu": 1e10, "gpu": 1e14, "pod": 1e16}
_START = 20
_MOST_PLACES = 8


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "ablation", None, "File of the ablation.", required=True, flag_values=values
    )
    flags.DEFINE_string("workdir", "runs/ablations", "Folder of all runs.", flag_values=values)
    flags.DEFINE_string(
        "output", None, "Folder of the report; WORKDIR/NAME by default.", flag_values=values
    )
    flags.DEFINE_enum("scale", "cpu", SCALES, "Sizes and budgets.", flag_values=values)
    flags.DEFINE_integer(
        "seeds",
        0,
        "Seeds; 0 for the ablation's own number.",
        lower_bound=0,
        upper_bound=MOST,
        flag_values=values,
    )
    flags.DEFINE_list("arms", [], "Only these arms.", flag_values=values)
    flags.DEFINE_integer(
        "side_by_side",
        0,
        "Runs at a time, with a share of cores and GPUs each; 0 for a core each at --scale=cpu.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "steps", 0, "Only so many steps, for a trial.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_bool("dry_run", False, "Print arms, sizes and time.", flag_values=values)


def main(given: flags.FlagValues) -> None:
    """Trains what is missing and writes the report."""
    signals.advise("run the same command to go on")
    for name, path in (("--workdir", given.workdir), ("--output", given.output)):
        if path:
            files.check_folder(Path(path), name)
    file = library.ablation_file(given.ablation)
    ablation = load(file)
    arms = given.arms or list(ablation.arms)
    seeds = given.seeds or ablation.seeds
    runs = runs_of(ablation, given.scale, seeds, arms, Path(given.workdir), given.steps)
    if given.dry_run:
        print(_dry(runs, given))
        return
    output = Path(given.output or Path(given.workdir) / ablation.name)
    output.mkdir(parents=True, exist_ok=True)
    try:
        execute(runs, file, _side_by_side(given))
    except signals.Interrupted as stop:
        ended = sum(run.ended for run in runs)
        detail = f": {ended} of {len(runs)} runs have ended, those under way are saved"
        raise signals.Interrupted(stop.number, detail) from None
    for run in (run for run in runs if not run.ended):
        print(f"left out: arm {run.arm}, seed {run.seed}, since what it needs has diverged")
    records = [record(run) for run in runs if run.ended]
    if not records:
        raise TrainingError(f"no run ended: what the arms {', '.join(arms)} need has diverged")
    lines = "".join(json.dumps(line) + "\n" for line in records)
    (output / "results.jsonl").write_text(lines)
    command = command_of(file, ablation, records, given.output)
    write_report(ablation, records, command, output)
    print(f"report: {output}/report.md")


def _side_by_side(given: flags.FlagValues) -> int:
    alone = 1 if given.scale != "cpu" else min(os.cpu_count() or 1, _MOST_PLACES)
    return given.side_by_side or alone


def _dry(runs: list[Run], given: flags.FlagValues) -> str:
    lines = [f"{'arm':24s} {'parameters':>14s} {'FLOPs/token':>12s} {'training FLOPs':>14s}"]
    for run in (run for run in runs if run.seed == 0):
        cost, flops = run.cost, f"{run.training_flops:.2e}"
        lines.append(f"{run.arm:24s} {cost.total:14,} {cost.flops_per_token:12,} {flops:>14s}")
    unique = to_train(runs)
    training = sum(run.training_flops for run in unique) / _RATE[given.scale]
    minutes = (training + _START * len(unique)) / _side_by_side(given) / 60
    lines.append(f"{len(runs)} runs, {len(unique)} to train, some {minutes:.0f} min")
    return "\n".join(lines)


if __name__ == "__main__":
    common.run(define, main)
