"""The runs of an ablation: their folders, and the processes that train them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moe_jax import signals
from moe_jax.ablation.ablation import Ablation
from moe_jax.ablation.shares import MachineShare, graphics_cards
from moe_jax.config.experiment import Experiment
from moe_jax.counting import Cost, count
from moe_jax.errors import ConfigError, TrainingError
from moe_jax.run.workdir import CONFIG, DIVERGED, RESULT, locked
from moe_jax.training.metrics import read_metrics

_LOG = "log.txt"
# These settings do not change the computation of a run.
_FREE = ("mesh", "name")
_COMPILED = "compiled"
_POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        arm: Name of the arm.
        seed: Seed of data order and weights.
        argument: Argument with which the file of the ablation returns the configuration.
        experiment: Configuration of the run.
        folder: Working directory, named by a hash of the configuration.
        needs: Runs of other arms that must finish first, by the setting that names their folder.
    """

    arm: str
    seed: int
    argument: str
    experiment: Experiment
    folder: Path
    needs: Mapping[str, Run] = dataclasses.field(default_factory=dict)

    @property
    def scale(self) -> str:
        """Scale of sizes and budgets."""
        return self.argument.split(",")[1]

    @property
    def finished(self) -> bool:
        """Whether the run has a result."""
        return (self.folder / RESULT).exists()

    @property
    def diverged(self) -> bool:
        """Whether the run ended without a result, since loss or gradient stayed non-finite."""
        return not self.finished and (self.folder / DIVERGED).exists()

    @property
    def ended(self) -> bool:
        """Whether the run needs no more training."""
        return self.finished or self.diverged

    @property
    def possible(self) -> bool:
        """Whether none of the runs that it needs has diverged."""
        return not any(need.diverged or not need.possible for need in self.needs.values())

    @property
    def result(self) -> dict[str, Any]:
        """Result file of the run: its validation, or the report of its divergence."""
        return self._read(DIVERGED if self.diverged else RESULT)

    @property
    def about(self) -> dict[str, Any]:
        """Configuration of the run, and the versions that trained it."""
        return self._read(CONFIG)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Training lines of the log."""
        return [line for line in read_metrics(self.folder) if line["kind"] == "train"]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Evaluation lines of the log, during and after training."""
        return [line for line in read_metrics(self.folder) if line["kind"] == "eval"]

    @property
    def cost(self) -> Cost:
        """Parameters and FLOPs of the model."""
        return count(self.experiment.model, self.experiment.vocab_size, self.experiment.sequence)

    @property
    def tokens(self) -> int:
        """Number of training tokens, if the run does not diverge."""
        return self.experiment.tokens_per_step * self.experiment.training.steps

    @property
    def training_flops(self) -> int:
        """FLOPs of all training tokens, with the FLOPs of the teacher."""
        teacher = self.needs.get("training.teacher")
        per_token = self.cost.training_flops_per_token
        if teacher:
            per_token += teacher.cost.flops_per_token
        return per_token * self.tokens

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise TrainingError(
                f"{path} is damaged ({error}): delete it, and run the same command"
            ) from error


def runs_of(
    ablation: Ablation, scale: str, seeds: int, arms: Iterable[str], workdir: Path, steps: int = 0
) -> list[Run]:
    """Returns all runs, seed by seed, so that the first runs already compare all arms.

    Args:
        ablation: Ablation of the runs.
        scale: Scale of the runs.
        seeds: Number of seeds.
        arms: Names of the arms.
        workdir: Folder of the runs of all ablations.
        steps: Training steps; 0 for the steps of the scale.
    """
    arms = list(arms)
    return [
        run_of(ablation, scale, ablation.first_seed + number, arm, workdir, steps)
        for number in range(seeds)
        for arm in arms
    ]


def run_of(
    ablation: Ablation, scale: str, seed: int, arm: str, workdir: Path, steps: int = 0
) -> Run:
    """Returns one run; see ``runs_of`` for the arguments."""
    experiment = ablation.experiment(arm, scale, seed)
    if steps:
        experiment = _with(experiment, {"training.steps": steps})
    needs = {
        setting: run_of(ablation, scale, seed, other, workdir, steps)
        for setting, other in ablation.finished(arm).items()
    }
    # The hash identifies the other run by its configuration, so all runs can be moved together.
    named = _with(experiment, {setting: need.folder.name for setting, need in needs.items()})
    folders = {setting: str(need.folder) for setting, need in needs.items()}
    argument, folder = f"{arm},{scale},{seed}", workdir / "runs" / fingerprint(named)
    return Run(arm, seed, argument, _with(experiment, folders), folder, needs)


def _with(experiment: Experiment, settings: Mapping[str, Any]) -> Experiment:
    """Returns the experiment with new settings, given by dotted names."""
    for name, value in settings.items():
        part, _, key = name.rpartition(".")
        changed = dataclasses.replace(getattr(experiment, part), **{key: value})
        experiment = dataclasses.replace(experiment, **{part: changed})
    return experiment


def to_train(runs: Iterable[Run]) -> list[Run]:
    """Returns the runs to train, each once, every run after the runs that it needs."""
    missing: dict[Path, Run] = {}
    for run in runs:
        if not run.ended:
            missing |= {need.folder: need for need in to_train(run.needs.values())}
            missing[run.folder] = run
    return list(missing.values())


def fingerprint(experiment: Experiment) -> str:
    """Returns a hash of all settings that change the computation of a run.

    The hash leaves settings at their default out, so a new setting does not outdate old results.
    """
    chosen = {key: value for key, value in _chosen(experiment).items() if key not in _FREE}
    text = json.dumps(chosen, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _chosen(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_chosen(item) for item in value]
    if isinstance(value, str):
        # Paths of package files must not depend on where the package is installed.
        return value.replace(sysconfig.get_path("purelib"), "site-packages")
    if not dataclasses.is_dataclass(value):
        return value
    set_ = {
        field.name: _chosen(getattr(value, field.name))
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != _default(field)
    }
    return {"type": type(value).__name__, **set_}


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def execute(runs: Sequence[Run], file: Path, side_by_side: int) -> None:
    """Trains all runs that have not ended; a killed run continues from its checkpoint.

    The runs that a run needs are trained first; if one of them diverges, the run is skipped.

    Args:
        runs: Runs of one ablation; equal runs are trained once.
        file: File of the ablation.
        side_by_side: Number of simultaneous runs; each has a share of the cores and GPUs.

    Raises:
        TrainingError: A run fails other than by divergence; the message holds its last log line.
        Interrupted: The user pressed Ctrl-C or sent SIGTERM; the active runs have saved a step.
    """
    needed = [need for run in runs if not run.ended for need in run.needs.values()]
    if needed:
        execute(needed, file, side_by_side)
    missing = list({run.folder: run for run in runs if not run.ended and run.possible}.values())
    if not missing:
        return
    cards = graphics_cards()
    places: queue.Queue[MachineShare] = queue.Queue()
    for index in range(side_by_side):
        places.put(MachineShare(index, side_by_side, cards))
    children = _Children()

    def one(run: Run) -> None:
        place = places.get()
        try:
            _train(run, file, place, children)
        finally:
            places.put(place)

    with (
        signals.second_time(children.kill),
        _drained(ThreadPoolExecutor(side_by_side), children) as pool,
        tqdm(total=len(missing), unit="run") as bar,
    ):
        for _ in pool.map(one, missing):
            bar.update()


@contextlib.contextmanager
def _drained(pool: ThreadPoolExecutor, children: _Children) -> Iterator[ThreadPoolExecutor]:
    """Yields the pool; at the end, starts no more runs and waits for the active runs."""
    try:
        with children.stopping():
            yield pool
    finally:
        try:
            with children.stopping():
                pool.shutdown(cancel_futures=True)
        except signals.Interrupted:
            pool.shutdown()
            raise


class _Children:
    """The active training processes; after a stop signal, no process starts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self.stopped = threading.Event()

    def run(self, command: Sequence[str], **options: Any) -> int | None:
        """Runs a command to its end and returns its exit code; ``None`` after a stop signal."""
        with self._lock:
            if self.stopped.is_set():
                return None
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
            self._running.add(process)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.discard(process)

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Forwards the signal that ends the block; a terminal may also have sent it."""
        try:
            yield
        except signals.Interrupted as stop:
            with self._lock:
                self.stopped.set()
                for process in self._running:
                    process.send_signal(stop.number)
            raise

    def kill(self) -> None:
        """Kills all processes."""
        for process in list(self._running):
            process.kill()


def _train(run: Run, file: Path, place: MachineShare, children: _Children) -> None:
    _wait_for(run, children)
    if run.ended:
        return
    command = [sys.executable, "-m", "moe_jax.train", f"--config={file}:{run.argument}"]
    command.append(f"--config.training.steps={run.experiment.training.steps}")
    command += [f"--config.{setting}={need.folder}" for setting, need in run.needs.items()]
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str((run.folder.parent / _COMPILED).absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / _LOG).open("a") as log:
        code = children.run(
            [*command, f"--workdir={run.folder}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | compiled | place.take(run.scale),
        )
    if children.stopped.is_set() or run.diverged or (code == 0 and run.finished):
        return
    last = (run.folder / _LOG).read_text().strip().splitlines()[-1:]
    raise TrainingError(
        f"arm {run.arm}, seed {run.seed} ended without a result ({' '.join(last)}); the rest "
        f"is in {run.folder / _LOG}"
    )


def _wait_for(run: Run, children: _Children) -> None:
    """Waits for a process that a killed runner has started and that still trains the run."""
    while not children.stopped.is_set():
        try:
            with locked(run.folder):
                return
        except ConfigError:
            children.stopped.wait(_POLL_SECONDS)
