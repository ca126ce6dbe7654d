"""A sweep: its runs, which real training commands carry out, and the page that compares them."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax import files, signals
from moe_jax.analysis.compare import write_comparison
from moe_jax.analysis.curves import metric_by_setting
from moe_jax.config.library import config_file
from moe_jax.errors import ConfigError, TrainingError, nearest
from moe_jax.run.shares import MachineShare, graphics_cards, shares_of
from moe_jax.run.side_by_side import Place, side_by_side
from moe_jax.sweeps.axes import Axis, Point, axes_of, grid, name_of
from moe_jax.sweeps.plan import METRICS, SweepPlan, SweepRun, Texts
from moe_jax.sweeps.sampler import NAMES, OptunaStudy, check_sampler

RESULTS, PAGE = "results.jsonl", "sweep.html"
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Search:
    """How a sweep chooses its runs and carries them out; see ``sweep``.

    Attributes:
        sampler: ``grid``, or the name of a sampler.
        trials: Number of runs of a sampler.
        metric: Metric of the validation that runs are ranked by.
        places: Number of concurrent runs; 0 for one per GPU, and one without GPUs.
    """

    sampler: str = "grid"
    trials: int = 0
    metric: str = "loss"
    places: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError if a name is unknown or the sampler cannot run."""
        for what, name, known in (
            ("--sampler", self.sampler, NAMES),
            ("--metric", self.metric, [*METRICS]),
        ):
            if name not in known:
                raise ConfigError(f"{what}={name} is unknown{nearest(name, known)}")
        check_sampler(self.sampler, self.trials)

    @property
    def scale(self) -> str:
        """Scale of the runs, as ``MachineShare.take`` names it."""
        return "cpu" if os.environ.get("JAX_PLATFORMS") == "cpu" else "gpu"

    @property
    def shares(self) -> list[MachineShare]:
        """Shares of the machine, one for each concurrent run."""
        cards = len(graphics_cards()) if self.scale == "gpu" else 0
        return shares_of(self.places or cards or 1)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs of a sweep.

    Attributes:
        trials: Runs in the order in which they started.
        axes: Settings that the runs change.
        metric: Metric that the runs are ranked by.
        folder: Folder of the sweep, with ``results.jsonl`` and ``sweep.html``.
    """

    trials: Sequence[SweepRun]
    axes: Sequence[Axis]
    metric: str
    folder: Path

    @property
    def records(self) -> list[dict[str, Any]]:
        """One record for each run: its settings, its state and its validation; the best first."""
        sign, worst = -1 if METRICS[self.metric] else 1, float("inf")

        def place(line: Mapping[str, Any]) -> float:
            value = line.get(self.metric)
            return sign * value if value is not None and math.isfinite(value) else worst

        return sorted((trial.record for trial in self.trials), key=place)

    @property
    def best(self) -> dict[str, Any]:
        """The first record.

        Raises:
            TrainingError: If no run has finished.
        """
        found = self.records[0]
        if self.metric not in found:
            raise TrainingError(f"no run of the sweep in {self.folder} has finished")
        return found

    @property
    def report(self) -> Path:
        """Page with the table of all runs, the metric by setting, and all curves."""
        return self.folder / PAGE

    def table(self) -> str:
        """Returns the records as lines of text."""
        columns = [axis.name for axis in self.axes] + [self.metric]
        rows = [columns, *([_cell(line, name) for name in columns] for line in self.records)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        )


@dataclasses.dataclass
class _Progress:
    """The runs of a sweep so far, which several threads add to."""

    plan: SweepPlan
    search: Search
    trials: dict[str, SweepRun] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    # A sampler may draw one point twice.
    busy: dict[str, threading.Lock] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(threading.Lock)
    )

    def train_grid(self, axes: Sequence[Axis]) -> None:
        """Trains every combination of values that has not ended."""
        trials = [self.plan.checked(point) for point in grid(axes)]
        self.trials = {trial.folder.name: trial for trial in trials}
        self.plan.folder.mkdir(parents=True, exist_ok=True)
        left = [trial.point for trial in trials if not trial.ended]
        side_by_side(left, self.search.shares, self._train)

    def train_drawn(self, axes: Sequence[Axis]) -> None:
        """Trains the open trials of a study, and then as many new ones as are left."""
        self.plan.folder.mkdir(parents=True, exist_ok=True)
        study = OptunaStudy(self.plan.folder, axes, self.search.sampler, self.search.metric)
        points = study.points
        left = [(number, points.pop(number)) for number in study.open]
        self.trials = {t.folder.name: t for t in map(self.plan.checked, points.values())}

        def work(_: int, place: Place) -> None:
            with self.lock:
                number, point = left.pop(0) if left else study.ask()
            trial = self._train(point, place)
            with self.lock:
                if trial is not None:
                    value = None if trial.diverged else trial.result[self.search.metric]
                    lost = value is None or not math.isfinite(value)
                    study.tell(number, None if lost else value, diverged=lost)
                elif name_of(point) in self.failures:
                    study.tell(number, None)

        side_by_side(range(self.search.trials - len(points)), self.search.shares, work)

    def _train(self, point: Point, place: Place) -> SweepRun | None:
        """Trains the run of a point; ``None`` if it fails or has not ended."""
        name = name_of(point)
        try:
            with self.lock:
                trial = self.trials[name] = self.plan.checked(point)
            with self.busy[name]:
                ended = place.train(self.plan.task(trial, self.search.scale))
        except (ConfigError, TrainingError) as error:
            self.failures[name] = str(error)
            return None
        return trial if ended else None


def sweep(
    config: str | Path,
    over: Mapping[str, Any] | Sequence[str],
    workdir: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    sampler: str = "grid",
    trials: int = 0,
    metric: str = "loss",
    side_by_side: int = 0,
    say: Say | None = None,
) -> Sweep:
    """Trains a run for every combination of values, or for values that a sampler draws.

    Each run is the command ``moe-jax train`` in a process and a folder of its own. The same call,
    repeated, trains only the runs that have not ended, and a stopped run goes on from its newest
    checkpoint.

    Args:
        config: Name of a config, with a variant after a colon, or a file.
        over: Values of each setting by its dotted name. ``seed`` stands for ``training.seed`` and
            ``data.seed``. The text ``"0..3"`` stands for 0, 1, 2 and 3, and the text
            ``"1e-4:1e-2:log"`` for a range from which a sampler draws.
        workdir: Folder of the sweep; the runs are in its folder ``runs``.
        overrides: Settings of all runs, by dotted name.
        sampler: ``grid`` for every combination, or a sampler of Optuna: ``random``, ``tpe`` or
            ``cmaes``.
        trials: Number of runs of a sampler.
        metric: Metric of the validation that runs are ranked by and a sampler improves: ``loss``,
            ``bits_per_byte`` or ``accuracy``.
        side_by_side: Number of concurrent runs, which share cores and GPUs; 0 for one per GPU, and
            one without GPUs.
        say: Function that receives the table and the path of the page; by default nothing is
            printed.

    Raises:
        ConfigError: If a setting or a value is wrong, or a run's folder holds another run. Except
            for values that a sampler draws, the error is raised before any run starts.
        TrainingError: If a run fails other than by divergence; the other runs are trained first.

    Examples:
        >>> import moe_jax as mj
        >>> try:
        ...     mj.sweep("quickstart", {"optimizer.learning_rate": "1e-4:1e-2:log"}, "runs/rates")
        ... except mj.ConfigError as error:
        ...     print(str(error).split(", from")[0])
        --over optimizer.learning_rate=1e-4:1e-2 is a range
    """
    texts = {name: str(value) for name, value in (overrides or {}).items()}
    search = Search(sampler, trials, metric, side_by_side)
    axes, quiet = axes_of(over), say or (lambda text: None)
    return carried_out(str(config), axes, Path(workdir), texts, search, quiet)


def carried_out(
    config: str, axes: Sequence[Axis], folder: Path, texts: Texts, search: Search, say: Say
) -> Sweep:
    """Trains the unfinished runs of a sweep and writes its page; see ``sweep``.

    Args:
        config: Config with its argument after a colon.
        axes: Settings to change.
        folder: Folder of the sweep.
        texts: Settings of all runs, as on a command line.
        search: Choice of the runs.
        say: Function that receives the table and the path of the page.

    Raises:
        ConfigError: If a setting is wrong; see ``sweep``.
        TrainingError: If a run fails.
        Interrupted: The user pressed Ctrl-C or sent SIGTERM; the active runs have saved a step.
    """
    files.check_folder(folder, "--workdir")
    name, colon, argument = config.partition(":")
    plan = SweepPlan(f"{config_file(name)}{colon}{argument}", texts, folder)
    typed = [plan.typed(axis) for axis in axes]
    progress = _Progress(plan, search)
    try:
        if search.sampler == "grid":
            progress.train_grid(typed)
        else:
            progress.train_drawn(typed)
    except signals.Interrupted as stop:
        ended = sum(trial.ended for trial in progress.trials.values())
        detail = f": {ended} runs have ended, and the active runs are saved"
        raise signals.Interrupted(stop.number, detail) from None
    done = Sweep([*progress.trials.values()], typed, search.metric, folder)
    _write(done)
    say(f"{done.table()}\n\npage: {done.report}")
    if progress.failures:
        first, *others = progress.failures.values()
        count = f"{len(others) + 1} runs failed, the first" if others else "1 run failed"
        raise TrainingError(f"{count}: {first}")
    return done


def _cell(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name, record["state"])
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _write(done: Sweep) -> None:
    """Writes ``results.jsonl`` and the page of a sweep."""
    lines = "".join(json.dumps(line) + "\n" for line in done.records)
    with files.replaced(done.folder / RESULTS) as temporary:
        temporary.write_text(lines)
    by_name = {trial.folder.name: trial.folder for trial in done.trials}
    ranked = [by_name[line["run"]] for line in done.records if line["state"] != "unfinished"]
    if ranked:
        finished = [line for line in done.records if line["state"] == "finished"]
        pictures = [
            (axis.name, metric_by_setting(finished, axis.name, done.metric))
            for axis in done.axes
            if len({line[axis.name] for line in finished}) > 1
        ]
        write_comparison(ranked, done.report, title="Sweep", pictures=pictures)
