"""An ablation from its runs to its verdicts."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moe_jax import files, signals
from moe_jax.ablation.ablation import Ablation
from moe_jax.ablation.catalogue import command_of, load
from moe_jax.ablation.records import record
from moe_jax.ablation.report import write_report
from moe_jax.ablation.runner import Run, execute, runs_of, to_train
from moe_jax.ablation.verdicts import Verdict, judge
from moe_jax.config import library
from moe_jax.errors import TrainingError

# What training sustains, FLOP/s (one core at this scale, measured; the others are guesses), and
# seconds that a run takes beside it.
_RATE = {"cpu": 1e10, "gpu": 1e14, "pod": 1e16}
_START = 20
_MOST_PLACES = 8


@dataclasses.dataclass(frozen=True)
class Study:
    """An ablation with the runs that are wanted of it.

    Attributes:
        file: of the ablation.
        ablation: the ablation.
        scale: of sizes and budgets.
        arms: by name.
        runs: one per arm and seed.
        side_by_side: runs at a time.
    """

    file: Path
    ablation: Ablation
    scale: str
    arms: tuple[str, ...]
    runs: tuple[Run, ...]
    side_by_side: int

    @property
    def minutes(self) -> float:
        """A guess of the time that is left."""
        unique = to_train(self.runs)
        training = sum(run.training_flops for run in unique) / _RATE[self.scale]
        return (training + _START * len(unique)) / self.side_by_side / 60

    def outline(self) -> str:
        """Returns arms, sizes and time, in lines."""
        lines = [f"{'arm':24s} {'parameters':>14s} {'FLOPs/token':>12s} {'training FLOPs':>14s}"]
        for run in (run for run in self.runs if run.seed == 0):
            cost, flops = run.cost, f"{run.training_flops:.2e}"
            lines.append(f"{run.arm:24s} {cost.total:14,} {cost.flops_per_token:12,} {flops:>14s}")
        left = len(to_train(self.runs))
        lines.append(f"{len(self.runs)} runs, {left} to train, some {self.minutes:.0f} min")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """What the runs of an ablation say.

    Attributes:
        ablation: the ablation.
        records: one per run that has ended, with its metrics.
        report: the page ``report.md``, with figures beside it.
    """

    ablation: Ablation
    records: list[dict[str, Any]]
    report: Path

    @property
    def verdicts(self) -> list[Verdict]:
        """What the runs say of each claim of which two seeds of both arms have ended."""
        found = (judge(claim, self.records) for claim in self.ablation.claims)
        return [verdict for verdict in found if verdict is not None]


def study(
    name: str | Path,
    *,
    workdir: str | Path = "runs/ablations",
    scale: str = "cpu",
    seeds: int = 0,
    arms: Sequence[str] = (),
    steps: int = 0,
    side_by_side: int = 0,
) -> Study:
    """Plans the runs of an ablation; see ``reproduce``."""
    file = library.ablation_file(str(name))
    ablation = load(file)
    chosen = tuple(arms or ablation.arms)
    runs = runs_of(ablation, scale, seeds or ablation.seeds, chosen, Path(workdir), steps)
    alone = 1 if scale != "cpu" else min(os.cpu_count() or 1, _MOST_PLACES)
    return Study(file, ablation, scale, chosen, tuple(runs), side_by_side or alone)


def reproduce(
    name: str | Path,
    *,
    workdir: str | Path = "runs/ablations",
    output: str | Path | None = None,
    scale: str = "cpu",
    seeds: int = 0,
    arms: Sequence[str] = (),
    steps: int = 0,
    side_by_side: int = 0,
    say: Callable[[str], None] | None = None,
) -> Reproduction:
    """Trains the arms of an ablation that are not finished, and judges the paper's claims.

    Args:
        name: of an ablation of the package, such as ``switch/capacity_factor``, or a file.
        workdir: folder of all runs; a run that is there is not trained again.
        output: folder of the report; ``WORKDIR/NAME`` by default.
        scale: ``cpu``, ``gpu`` or ``pod``: sizes and budgets.
        seeds: how many; 0 for the ablation's own number.
        arms: only these; all by default.
        steps: only so many steps, for a trial; 0 for those of the scale.
        side_by_side: runs at a time, with a share of the cores and GPUs each; 0 for one per core
            at the scale ``cpu``.
        say: takes what is left out, and where the report is; by default nothing is said.

    Raises:
        ConfigError: if there is no such ablation, scale or arm.
        TrainingError: if a run fails, other than by diverging.

    Examples:
        Two arms of Switch's table 1, for one step:

        >>> import moe_jax as mj
        >>> arms = ["switch_2.0", "switch_1.0"]
        >>> trial = mj.reproduce("switch/capacity_factor", arms=arms, seeds=1, steps=1)
        >>> [record["arm"] for record in trial.records], trial.report.name
        (['switch_2.0', 'switch_1.0'], 'report.md')
        >>> trial.verdicts  # they need two seeds
        []
    """
    wanted = study(
        name,
        workdir=workdir,
        scale=scale,
        seeds=seeds,
        arms=arms,
        steps=steps,
        side_by_side=side_by_side,
    )
    return carried_out(wanted, workdir, output, say or (lambda text: None))


def carried_out(
    wanted: Study, workdir: str | Path, output: str | Path | None, say: Callable[[str], None]
) -> Reproduction:
    """Trains what is missing and writes the report; see ``reproduce``.

    Raises:
        TrainingError: if a run fails, or none has ended.
        Interrupted: after Ctrl-C or SIGTERM, once every run that was under way has saved its step.
    """
    ablation, runs = wanted.ablation, wanted.runs
    folder = Path(output or Path(workdir) / ablation.name)
    for path, flag in ((Path(workdir), "--workdir"), (folder, "--output")):
        files.check_folder(path, flag)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        execute(runs, wanted.file, wanted.side_by_side)
    except signals.Interrupted as stop:
        ended = sum(run.ended for run in runs)
        detail = f": {ended} of {len(runs)} runs have ended, those under way are saved"
        raise signals.Interrupted(stop.number, detail) from None
    for run in (run for run in runs if not run.ended):
        say(f"left out: arm {run.arm}, seed {run.seed}, since what it needs has diverged")
    records = [record(run) for run in runs if run.ended]
    if not records:
        names = ", ".join(wanted.arms)
        raise TrainingError(f"no run ended: what the arms {names} need has diverged")
    lines = "".join(json.dumps(line) + "\n" for line in records)
    (folder / "results.jsonl").write_text(lines)
    command = command_of(wanted.file, ablation, records, str(output) if output else None)
    write_report(ablation, records, command, folder)
    say(f"report: {folder}/report.md")
    return Reproduction(ablation, records, folder / "report.md")
