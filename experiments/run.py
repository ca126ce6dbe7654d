"""Runs an ablation: ``python -m experiments.run --ablation=FILE --workdir=FOLDER``.

``--ablation=experiments/switch/capacity_factor.py`` trains every arm with every seed, skips what is
finished, and writes ``results.jsonl``, ``report.md`` and figures to ``--output``. Run the same
command after an interruption to go on.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

from absl import flags

from experiments.ablation import SCALES, Ablation
from experiments.runs import Run, execute, record, runs_of, to_train
from experiments.tables import write_report
from moe_jax import cli
from moe_jax.errors import ConfigError
from moe_jax.planning import count

_ABLATION = flags.DEFINE_string("ablation", None, "File of the ablation.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", "runs/ablations", "Folder of all runs.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the report; WORKDIR/NAME by default.")
_SCALE = flags.DEFINE_enum("scale", "cpu", SCALES, "Sizes and budgets.")
_SEEDS = flags.DEFINE_integer("seeds", 0, "Seeds; 0 for the ablation's own number.", lower_bound=0)
_ARMS = flags.DEFINE_list("arms", [], "Only these arms.")
_SIDE_BY_SIDE = flags.DEFINE_integer(
    "side_by_side", 1, "Runs at a time, with a share of the cores and a GPU each.", 1
)
_STEPS = flags.DEFINE_integer("steps", 0, "Only so many steps, for a trial.", lower_bound=0)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print arms, sizes and time.")

# What training sustains, FLOP/s (one core at this scale, measured; the others are guesses), and
# seconds that a run takes beside it.
_RATE = {"cpu": 1e10, "gpu": 1e14, "pod": 1e16}
_START = 20


def load(file: Path) -> Ablation:
    """Returns the ``ABLATION`` of a file.

    Raises:
        ConfigError: if there is no such file, or nothing of this name in it.
    """
    if not file.is_file():
        raise ConfigError(f"--ablation={file} is not a file; see experiments/*/*.py")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not isinstance(getattr(module, "ABLATION", None), Ablation):
        raise ConfigError(f"{file} defines no ABLATION: see experiments/switch/capacity_factor.py")
    return module.ABLATION


def main() -> None:
    """Trains what is missing and writes the report."""
    file = Path(_ABLATION.value)
    ablation = load(file)
    arms = _ARMS.value or list(ablation.arms)
    seeds = _SEEDS.value or ablation.seeds
    runs = runs_of(ablation, _SCALE.value, seeds, arms, Path(_WORKDIR.value), _STEPS.value)
    if _DRY_RUN.value:
        print(_dry(runs))
        return
    output = Path(_OUTPUT.value or Path(_WORKDIR.value) / ablation.name)
    output.mkdir(parents=True, exist_ok=True)
    execute(runs, file, _SIDE_BY_SIDE.value)
    records = [record(run) for run in runs]
    lines = "".join(json.dumps(line) + "\n" for line in records)
    (output / "results.jsonl").write_text(lines)
    command = f"python -m experiments.run --ablation={file} --scale={_SCALE.value}"
    write_report(ablation, records, command, output)
    print(f"report: {output}/report.md")


def _dry(runs: list[Run]) -> str:
    lines = [f"{'arm':24s} {'parameters':>14s} {'FLOPs/token':>12s} {'training FLOPs':>14s}"]
    for run in (run for run in runs if run.seed == 0):
        experiment = run.experiment
        cost = count(experiment.model, experiment.vocab_size, experiment.sequence)
        flops = f"{run.training_flops:.2e}"
        lines.append(f"{run.arm:24s} {cost.total:14,} {cost.flops_per_token:12,} {flops:>14s}")
    unique = to_train(runs)
    training = sum(run.training_flops for run in unique) / _RATE[_SCALE.value]
    minutes = (training + _START * len(unique)) / _SIDE_BY_SIDE.value / 60
    lines.append(f"{len(runs)} runs, {len(unique)} to train, some {minutes:.0f} min")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.argv = [argument.replace("--dry-run", "--dry_run") for argument in sys.argv]
    cli.run(main)
