"""Trains several runs side by side, each in a process of its own with a share of the machine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from moe_jax import signals
from moe_jax.errors import ConfigError, TrainingError
from moe_jax.run.shares import MachineShare
from moe_jax.run.workdir import CONFIG, DIVERGED, RESULT, locked
from moe_jax.training.metrics import read_metrics

T = TypeVar("T")
LOG = "log.txt"
_POLL_SECONDS = 0.5


class RunFiles:
    """The files of a run that its own process writes; the classes below have a ``folder``.

    Attributes:
        folder: Workdir of the run.
    """

    folder: Path

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

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise TrainingError(
                f"{path} is damaged ({error}): delete it, and run the same command"
            ) from error


@dataclasses.dataclass(frozen=True)
class Task(RunFiles):
    """A run that a process trains with the command ``moe-jax train``.

    Attributes:
        name: Name of the run in messages.
        arguments: Arguments of the command, without ``--workdir``.
        folder: Workdir of the run.
        compiled: Folder of compiled programs, which runs of equal shapes share.
        scale: ``cpu`` to train on the cores of the machine, whatever else it has.
    """

    name: str
    arguments: tuple[str, ...]
    folder: Path
    compiled: Path
    scale: str


@dataclasses.dataclass(frozen=True)
class Place:
    """A share of the machine, where one run after the other is trained."""

    _share: MachineShare
    _children: _Children

    def train(self, task: Task) -> bool:
        """Trains a run, from its newest checkpoint if it has one; a run that has ended stays.

        Returns:
            Whether the run has ended; False after a stop signal.

        Raises:
            TrainingError: The run fails other than by divergence; the message holds its last line.
        """
        self._wait_for(task.folder)
        if task.ended:
            return True
        task.folder.mkdir(parents=True, exist_ok=True)
        compiled = {
            "JAX_COMPILATION_CACHE_DIR": str(task.compiled.absolute()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        }
        command = ("moe_jax.train", *task.arguments, f"--workdir={task.folder}")
        log = task.folder / LOG
        code = self._run(command, log, compiled | self._share.take(task.scale))
        if task.diverged or (code == 0 and task.finished):
            return True
        if self._children.stopped.is_set():
            return False
        raise _without_result(task.name, log)

    def change(self, name: str, arguments: Sequence[str], folder: Path, scale: str) -> bool:
        """Runs a command of ``moe-jax`` that writes a folder; a folder that is there stays.

        Args:
            name: Name of the command in messages.
            arguments: Command and flags.
            folder: Folder that the command writes.
            scale: ``cpu`` to work on the cores of the machine, whatever else it has.

        Returns:
            Whether the folder is there; False after a stop signal.

        Raises:
            TrainingError: The command fails; the message holds its last line.
        """
        log = folder.with_name(f"{folder.name}_{LOG}")
        if not folder.exists():
            self._run(("moe_jax", *arguments), log, self._share.take(scale))
        if folder.exists() or self._children.stopped.is_set():
            return folder.exists()
        raise _without_result(name, log)

    def _run(self, command: Sequence[str], log: Path, settings: Mapping[str, str]) -> int | None:
        """Runs a module and appends what it prints to a log; see ``_Children.run``."""
        with log.open("a") as file:
            return self._children.run(
                [sys.executable, "-m", *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | settings,
            )

    def _wait_for(self, folder: Path) -> None:
        """Waits for a process that a killed runner has started and that still trains the run."""
        while not self._children.stopped.is_set():
            try:
                with locked(folder):
                    return
            except ConfigError:
                self._children.stopped.wait(_POLL_SECONDS)


def _without_result(name: str, log: Path) -> TrainingError:
    last = " ".join(log.read_text().strip().splitlines()[-1:])
    return TrainingError(f"{name} ended without a result ({last}); the rest is in {log}")


def side_by_side(
    items: Sequence[T], shares: Sequence[MachineShare], work: Callable[[T, Place], object]
) -> None:
    """Works on all items, as many at a time as there are shares of the machine.

    Args:
        items: Items in the order in which work on them starts.
        shares: Shares of the machine.
        work: Function of an item and the place where it may train.

    Raises:
        Interrupted: The user pressed Ctrl-C or sent SIGTERM; the active runs have saved a step.
    """
    if not items:
        return
    children = _Children()
    places: queue.Queue[Place] = queue.Queue()
    for share in shares:
        places.put(Place(share, children))

    def one(item: T) -> None:
        place = places.get()
        try:
            if not children.stopped.is_set():
                work(item, place)
        finally:
            places.put(place)

    with (
        signals.second_time(children.kill),
        _drained(ThreadPoolExecutor(len(shares)), children) as pool,
        tqdm(total=len(items), unit="run") as bar,
    ):
        for _ in pool.map(one, items):
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
