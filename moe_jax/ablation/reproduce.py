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
from moe_jax.ablation.catalogue import LINES, RESULTS, command_of, load, read
from moe_jax.ablation.derived import with_thresholds
from moe_jax.ablation.finished import Finished, check_corpora, finished_runs
from moe_jax.ablation.judgement import judged
from moe_jax.ablation.looks import undecided_arms
from moe_jax.ablation.pairs import TableAgreement, agreements
from moe_jax.ablation.records import record
from moe_jax.ablation.report import write_report
from moe_jax.ablation.runner import ChangedRun, Run, execute, runs_of, to_train
from moe_jax.ablation.statistics import LOOKS, Look
from moe_jax.ablation.verdicts import Verdict
from moe_jax.config import library
from moe_jax.errors import ConfigError, TrainingError

# Training speed in FLOP/s (measured on one core for ``cpu``, guessed for the others), and the
# seconds that a run takes besides training.
_RATE = {"cpu": 1.8e10, "gpu": 1e14, "pod": 1e16}
_START = 20
_MOST_PLACES = 8


@dataclasses.dataclass(frozen=True)
class Study:
    """An ablation and its planned runs.

    Attributes:
        file: File of the ablation.
        ablation: The ablation.
        scale: Scale of model sizes and budgets.
        arms: Names of the arms.
        runs: Runs, one per arm and seed; those of the first look, if the ablation is registered.
        side_by_side: Number of concurrent runs.
        seeds: Largest number of seeds.
        workdir: Folder of all runs.
        steps: Number of steps of each run, for a trial; 0 for the steps of the scale.
        finished: Records of an earlier command by arm and seed; their runs are not trained.
    """

    file: Path
    ablation: Ablation
    scale: str
    arms: tuple[str, ...]
    runs: tuple[Run, ...]
    side_by_side: int
    seeds: int
    workdir: Path
    steps: int = 0
    finished: Finished = dataclasses.field(default_factory=dict)

    @property
    def own_runs(self) -> list[Run]:
        """Runs that no earlier command has recorded."""
        return [run for run in self.runs if (run.arm, run.seed) not in self.finished]

    @property
    def records(self) -> list[dict[str, Any]]:
        """Records of the runs that have ended, in the order of the runs."""
        own = {(run.arm, run.seed): record(run) for run in self.own_runs if run.ended}
        known = {**self.finished, **own}
        keys = [(run.arm, run.seed) for run in self.runs]
        return [known[key] for key in keys if key in known]

    def next_look(self) -> tuple[Look, list[str], list[Run]] | None:
        """Returns the next look, its undecided arms and its runs; ``None`` if there is none."""
        if not self.ablation.registered:
            return None
        undecided = undecided_arms(self.ablation, self.records)
        arms = [arm for arm in undecided if arm in self.arms]
        known = {run.folder for run in self.runs}
        for look in LOOKS[1:]:
            seeds = min(look.seeds, self.seeds)
            runs = runs_of(self.ablation, self.scale, seeds, arms, self.workdir, self.steps)
            if more := [run for run in runs if run.folder not in known]:
                return look, arms, more
        return None

    @property
    def left(self) -> list[Run | ChangedRun]:
        """Runs to train: those of the first look, or of the next one if the first has ended."""
        runs = to_train(self.own_runs)
        following = None if runs else self.next_look()
        if following is None:
            return runs
        return dataclasses.replace(self, runs=(*self.runs, *following[2])).left

    @property
    def minutes(self) -> float:
        """Estimated minutes of the runs that are left to train."""
        unique = self.left
        training = sum(run.training_flops for run in unique) / _RATE[self.scale]
        return (training + _START * len(unique)) / self.side_by_side / 60

    def outline(self) -> str:
        """Returns arms, sizes and estimated time as lines of text."""
        lines = [f"{'arm':24s} {'parameters':>14s} {'FLOPs/token':>12s} {'training FLOPs':>14s}"]
        for run in (run for run in self.runs if run.seed == self.ablation.first_seed):
            cost, flops = run.cost, f"{run.training_flops:.2e}"
            lines.append(f"{run.arm:24s} {cost.total:14,} {cost.flops_per_token:12,} {flops:>14s}")
        lines.append(
            f"{len(self.runs)} runs, {len(self.left)} to train, about {self.minutes:.0f} min"
        )
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """The results of an ablation.

    Attributes:
        ablation: The ablation.
        records: Metrics of the runs that have ended, one record per run.
        report: Path of ``report.md``; its folder holds the figures.
    """

    ablation: Ablation
    records: list[dict[str, Any]]
    report: Path

    @property
    def verdicts(self) -> list[Verdict]:
        """Verdicts on the claims for which two seeds of both arms have ended."""
        return judged(self.ablation, self.records)

    @property
    def tables(self) -> list[TableAgreement]:
        """Every pair of arms of each printed table that the runs measure too."""
        return agreements(self.ablation, with_thresholds(self.ablation, self.records))


def study(
    name: str | Path,
    *,
    workdir: str | Path = "runs/ablations",
    scale: str = "cpu",
    seeds: int = 0,
    arms: Sequence[str] = (),
    steps: int = 0,
    side_by_side: int = 0,
    records: str | Path | None = None,
) -> Study:
    """Plans the runs of an ablation; see ``reproduce``."""
    file = library.ablation_file(str(name))
    ablation = load(file)
    chosen = tuple(arms or ablation.arms)
    most = seeds or ablation.seeds
    first = min(most, LOOKS[0].seeds) if ablation.registered else most
    runs = runs_of(ablation, scale, first, chosen, Path(workdir), steps)
    alone = 1 if scale != "cpu" else min(os.cpu_count() or 1, _MOST_PLACES)
    places = side_by_side or alone
    finished = finished_runs(records, ablation, scale, steps) if records else {}
    return Study(
        file, ablation, scale, chosen, tuple(runs), places, most, Path(workdir), steps, finished
    )


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
    records: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Reproduction:
    """Trains the unfinished runs of an ablation, and tests the claims of the paper.

    Args:
        name: Name of an ablation of the package, such as ``switch/capacity_factor``, or a file.
        workdir: Folder of all runs; a finished run in it is not trained again.
        output: Folder of the report; ``WORKDIR/NAME`` by default.
        scale: Scale of model sizes and budgets: ``cpu``, ``gpu`` or ``pod``.
        seeds: Number of seeds; 0 for the number that the ablation sets. A registered ablation
            trains the arms of decided claims at fewer seeds, so 4 is its first look.
        arms: Names of the arms to run; all by default.
        steps: Number of steps of each run, for a trial; 0 for the steps of the scale.
        side_by_side: Number of concurrent runs, which share cores and GPUs; 0 for one per core at
            the scale ``cpu``.
        records: ``results.jsonl`` of an earlier command, whose runs are not trained again, or
            ``committed`` for the records of the package; by default all runs are trained.
        say: Function that prints skipped runs and the path of the report; by default nothing is
            printed.

    Raises:
        ConfigError: The ablation, the scale or an arm is unknown, or the records are of other
            configurations or of another corpus.
        TrainingError: A run fails other than by divergence.

    Examples:
        Two arms of Switch table 1, trained for one step:

        >>> import moe_jax as mj
        >>> arms = ["switch_2.0", "switch_1.0"]
        >>> trial = mj.reproduce("switch/capacity_factor", arms=arms, seeds=1, steps=1)
        >>> [record["arm"] for record in trial.records], trial.report.name
        (['switch_2.0', 'switch_1.0'], 'report.md')
        >>> trial.verdicts  # a verdict needs two seeds
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
        records=records,
    )
    return carried_out(wanted, workdir, output, say or (lambda text: None))


def committed(name: str | Path) -> Reproduction:
    """Returns the committed results of an ablation, judged anew from the records of their runs.

    Args:
        name: Name of an ablation of the package, such as ``deepseek/bake_off``, or a file.

    Raises:
        ConfigError: The ablation is unknown, or has no committed results.

    Examples:
        >>> import moe_jax as mj
        >>> found = mj.committed("deepseek/bake_off")
        >>> found.verdicts[0].claim.text
        'A hash router has a lower loss than a dense model'
        >>> found.verdicts[0].text
        'reproduced'
    """
    ablation = load(library.ablation_file(str(name)))
    folder = RESULTS / ablation.name
    if not (folder / LINES).is_file():
        raise ConfigError(f"{name} has no committed results; mj.reproduce({str(name)!r}) trains it")
    return Reproduction(ablation, read(folder / LINES), folder / "report.md")


def carried_out(
    wanted: Study, workdir: str | Path, output: str | Path | None, say: Callable[[str], None]
) -> Reproduction:
    """Trains the unfinished runs and writes the report; see ``reproduce``.

    Raises:
        TrainingError: A run fails, or no run has ended.
        Interrupted: The user pressed Ctrl-C or sent SIGTERM; the active runs have saved a step.
    """
    ablation = wanted.ablation
    folder = Path(output or Path(workdir) / ablation.name)
    for path, flag in ((Path(workdir), "--workdir"), (folder, "--output")):
        files.check_folder(path, flag)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = _after_looks(_executed(wanted), say)
    for run in (run for run in wanted.own_runs if not run.ended):
        say(f"left out: arm {run.arm}, seed {run.seed}: a run that it needs has diverged")
    records = wanted.records
    if not records:
        names = ", ".join(wanted.arms)
        raise TrainingError(f"no run ended: the runs that {names} need have diverged")
    lines = "".join(json.dumps(line) + "\n" for line in records)
    (folder / "results.jsonl").write_text(lines)
    command = command_of(wanted.file, ablation, records, str(output) if output else None)
    write_report(ablation, records, command, folder)
    say(f"report: {folder}/report.md")
    return Reproduction(ablation, records, folder / "report.md")


def _executed(wanted: Study) -> Study:
    """Trains the unfinished runs of a study, and returns the study."""
    runs = wanted.own_runs
    check_corpora(runs, wanted.finished)
    try:
        execute(runs, wanted.file, wanted.side_by_side)
    except signals.Interrupted as stop:
        ended = sum(run.ended for run in runs)
        detail = f": {ended} of {len(runs)} runs have ended, and the active runs are saved"
        raise signals.Interrupted(stop.number, detail) from None
    return wanted


def _after_looks(wanted: Study, say: Callable[[str], None]) -> Study:
    """Trains more seeds of the arms that are not decided, look by look."""
    while (following := wanted.next_look()) is not None:
        look, arms, more = following
        say(f"{look.seeds} seeds of {', '.join(arms)}, which are not decided: {len(more)} runs")
        wanted = _executed(dataclasses.replace(wanted, runs=(*wanted.runs, *more)))
    return wanted
