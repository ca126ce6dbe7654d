"""Checkpoints that survive a kill, a full disk and a damaged file.

Orbax writes the arrays asynchronously and commits a step by renaming its directory. This module
adds a SHA-256 of every file, because Orbax alone loads an array file with a flipped byte without an
error. The checksums are written into the step directory just before the rename, and are checked
before anything is loaded. A step directory without checksums is damaged; a kill cannot produce one,
because the checksums are written before the rename. Orbax writes its own metadata and its commit
marker at the same time or later, so only the format of the metadata is checked, and the commit
marker is not checked.

A step directory ``<step>/`` holds ``state/`` (the pytree, in Orbax's format), ``data_state/`` (one
JSON file per process) and ``integrity.json``. The first step of a quantised run also holds
``quantised.safetensors``, and its pytree lacks the arrays of that file. Nothing is pickled, and
loading runs no stored code.

A reader never changes the directory. The first ``save`` of a writer removes the leftovers of a
killed run and moves damaged steps to ``corrupt-<step>-<n>``. Only one run at a time may write.
"""

from __future__ import annotations

import contextlib
import logging as stdlib_logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from absl import logging
from etils import epath
from orbax.checkpoint import v1 as ocp

from moe_jax import processes
from moe_jax.errors import CheckpointError, ConfigError, line_of
from moe_jax.models.leading_axis import as_wanted
from moe_jax.quantised.packed import PackedFile, PackedLeaves
from moe_jax.training.data_state import DataState, read_data_state
from moe_jax.training.integrity import damage, write_integrity
from moe_jax.training.saved_arrays import named, require_same_parameters, with_saved_axes
from moe_jax.training.step_folders import (
    committed,
    latest_step,
    move_aside,
    require_writable,
    unfinished,
)

PyTree = Any

_STATE, _DATA = "state", "data_state"
_FREE, _MOVED, _OCCUPIED = 0, 1, 2


@dataclass
class _Pinned(ocp.training.preservation_policies.PreservationPolicy):
    """Preserves one step, which may change between saves.

    Attributes:
        step: The step, or 0.
    """

    step: int = 0

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each checkpoint whether it is preserved."""
        del context
        return [checkpoint.step == self.step for checkpoint in checkpoints]


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that ``restore`` skipped.

    Attributes:
        step: Step of the checkpoint.
        path: Path of the checkpoint's directory.
        reason: Reason for which the checkpoint was skipped.
    """

    step: int
    path: str
    reason: str

    def __str__(self) -> str:
        return f"skipped checkpoint step {self.step} ({self.path}): {self.reason}"


class Checkpoints:
    """The checkpoints of one run, in one directory."""

    def __init__(
        self,
        directory: str | epath.PathLike,
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        asynchronous: bool = True,
        read_only: bool = False,
    ):
        """Opens ``directory`` for checkpoints, and creates it if needed.

        Args:
            directory: Directory of the step directories; only one run at a time may write to it.
            keep_last: Number of the newest checkpoints that are kept.
            keep_every: Period of the steps whose checkpoints are kept for ever; ``None`` for none.
            asynchronous: True if ``save`` returns before the files are written.
            read_only: True if nothing will be saved, so the directory need not be writable.

        Raises:
            ConfigError: If ``keep_last`` or ``keep_every`` is below 1.
            CheckpointError: If the directory cannot be written.
        """
        for name, value in (("keep_last", keep_last), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ConfigError(f"checkpoint {name} is {value}; it must be at least 1")
        self.directory = epath.Path(directory).expanduser().resolve()
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._pinned = _Pinned()
        self._asynchronous = asynchronous
        self._skipped: tuple[Skipped, ...] = ()
        self._damaged: dict[int, str] = {}
        self._writer: ocp.training.Checkpointer | None = None
        self._data_state: DataState | None = None
        self._pending: tuple[int, Future] | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if jax.process_index() == 0 and not read_only:
            require_writable(self.directory)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Checkpoints that the last ``restore`` skipped, newest first (on the first process)."""
        return self._skipped

    def latest_step(self) -> int | None:
        """Returns the newest committed step on disk, unverified; ``None`` without any step."""
        return latest_step(self.directory)

    def pin(self, step: int) -> None:
        """Keeps the checkpoint of ``step`` in all later saves, instead of the one pinned before."""
        self._pinned.step = step

    def save(self, step: int, state: PyTree, data_state: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint; on return ``state`` may be donated or overwritten.

        The call waits for the previous save, if it is still running. The complete checkpoint
        appears by a rename. Until then, and if the process dies, earlier checkpoints are unchanged.

        Args:
            step: Training step, which names the checkpoint.
            state: Pytree of ``jax.Array``, sharded or not. PRNG keys may be typed
                (``jax.random.key``) or raw uint32.
            data_state: Position in the input: dicts with string keys, lists, tuples, strings,
                bytes, numbers, booleans and ``None``. Each process saves its own position, and
                ``restore`` returns the union. Tuples return as lists.

        Raises:
            CheckpointError: If an earlier asynchronous save failed, if an intact checkpoint of this
                step exists, or if this save fails before it is in the background.
            TypeError: If ``data_state`` holds a value of another type.
        """
        self.wait()
        self._data_state = DataState(data_state, _DATA)
        try:
            writer = self._open_writer(step)
            response = writer.save_checkpointables_async(
                step, {_STATE: state, _DATA: self._data_state}, force=True
            )
        except CheckpointError:
            raise
        except Exception as error:
            self._drop_writer()
            raise self._save_failed(step, error) from error
        self._pending = (step, self._executor.submit(response.result))
        if not self._asynchronous:
            self.wait()

    def check(self) -> None:
        """Raises the error of a failed save without waiting; a run calls it in every step.

        Raises:
            CheckpointError: If an asynchronous save has failed; each failure is raised once.
        """
        if self._pending is not None and self._pending[1].done():
            self._settle()

    def wait(self) -> None:
        """Waits until no checkpoint is being written.

        Raises:
            CheckpointError: If an asynchronous save has failed.
        """
        if self._pending is not None:
            self._settle()

    def restore(
        self, like: PyTree, *, partial: bool = False, step: int | None = None
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Returns the newest checkpoint whose files are all intact, or the checkpoint of a step.

        Damaged and unfinished checkpoints are skipped, with a warning and an entry in ``skipped``.

        Args:
            like: State as ``jax.ShapeDtypeStruct`` with shardings, on any mesh.
            partial: True if ``like`` is only a part of the saved state; the rest is not read.
            step: Step of the checkpoint; ``None`` for the newest intact one.

        Returns:
            The step, the state and the data state; ``None`` if no checkpoint was ever committed.

        Raises:
            CheckpointError: If checkpoints exist but none is intact, if there is no intact one of
                ``step``, if the checkpoint is of another model, or if it cannot be loaded.
        """
        self.wait()
        wanted = step
        step = self._agree(self._newest_intact if wanted is None else lambda: self._intact(wanted))
        if step < 0:
            return None
        path = self.directory / str(step)
        try:
            packed = PackedFile(path)
            quantised, like = _parted(like, packed.leaves)
            saved = named(ocp.metadata(path, checkpointable_name=_STATE).metadata)
            target = with_saved_axes(like, saved)
            require_same_parameters(path, saved, target, partial)
            data_state = read_data_state(path / _DATA)
            with _loading(partial):
                state = ocp.load_checkpointables(path, {_STATE: target})[_STATE]
            state = jax.tree.map(as_wanted, state, like)
            if quantised:
                state |= packed.fill(quantised)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {path} is intact but cannot be loaded: {line_of(error)}; "
                "check the memory, the mesh and the versions of jax and orbax-checkpoint"
            ) from error
        return step, state, data_state

    def close(self) -> None:
        """Waits for the running save and frees the threads.

        Raises:
            CheckpointError: If an asynchronous save has failed.
        """
        try:
            self.wait()
        finally:
            self._drop_writer()
            self._executor.shutdown()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            # The error that ended the block matters more than the failed save.
            if error is None:
                raise
            # If a full disk ended the block, then the failed save has the same cause.
            if not isinstance(error, OSError):
                logging.error("%s", failure)

    def _open_writer(self, step: int) -> ocp.training.Checkpointer:
        """Returns Orbax's checkpointer, after damaged checkpoints of ``step`` are moved aside."""
        room = self._agree(lambda: self._make_room(step))
        if room == _OCCUPIED:
            raise CheckpointError(
                f"an intact checkpoint of step {step} exists in {self.directory}; "
                "restore it before training on, or choose another directory"
            )
        if self._writer is None:
            _silence_orbax()
            self._writer = self._new_writer()
        elif room == _MOVED:
            self._writer.reload()
        return self._writer

    def _new_writer(self) -> ocp.training.Checkpointer:
        policies = ocp.training.preservation_policies
        preserved: list[Any] = [policies.LatestN(self._keep_last), self._pinned]
        if self._keep_every is not None:
            preserved.append(policies.EveryNSteps(self._keep_every))
        context = ocp.Context()
        # If a directory cannot be created, Orbax's threads would wait minutes for it, even at exit.
        context.async_options.create_directories_asynchronously = False
        # Orbax calls this function on the first process, when all processes have written, before it
        # commits. Orbax deep-copies its options, and a bound method cannot be deep-copied.
        context.async_options.post_finalization_callback = lambda: self._seal()
        return ocp.training.Checkpointer(
            self.directory,
            context=context,
            preservation_policy=policies.AnyPreservationPolicy(preserved),
            cleanup_tmp_directories=True,
        )

    def _drop_writer(self) -> None:
        """Closes Orbax's checkpointer; the next save opens a new one that reads the directory."""
        writer, self._writer = self._writer, None
        if writer is not None:
            # Orbax raises the error of a failed save again in each thread, before it closes.
            with contextlib.suppress(Exception):
                writer.wait()
            with contextlib.suppress(Exception):
                writer.close()

    def _seal(self) -> None:
        """Writes the checksums of the checkpoint that Orbax is about to commit."""
        assert self._data_state is not None
        assert self._data_state.step_directory is not None
        write_integrity(self._data_state.step_directory)

    def _settle(self) -> None:
        """Waits for the pending save and raises its failure."""
        assert self._pending is not None
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except Exception as error:
            self._drop_writer()
            raise self._save_failed(step, error) from error

    def _save_failed(self, step: int, error: Exception) -> CheckpointError:
        good = self.latest_step()
        unchanged = "" if good is None else f"checkpoint {good} is as it was, "
        return CheckpointError(
            f"checkpoint step {step} was not saved to {self.directory}: {line_of(error)}; "
            f"{unchanged}check that the directory exists, is writable and has free space, then run "
            "the same command to go on"
        )

    def _agree(self, decide: Callable[[], int]) -> int:
        """Returns on every process the result of ``decide`` on the first process."""
        return processes.agreed(decide, CheckpointError)

    def _newest_intact(self) -> int:
        """Returns the step to restore, or -1 if no checkpoint was ever committed."""
        skipped = [Skipped(*entry) for entry in unfinished(self.directory)]
        chosen = -1
        self._damaged = {}
        for step in committed(self.directory):
            reason = damage(self.directory / str(step))
            if reason is None:
                chosen = step
                break
            self._damaged[step] = reason
            skipped.append(Skipped(step, str(self.directory / str(step)), reason))
        skipped = [entry for entry in skipped if entry.step > chosen]
        self._skipped = tuple(sorted(skipped, key=lambda entry: -entry.step))
        if chosen < 0 and self._damaged:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in self._damaged.items())
            raise CheckpointError(
                f"no checkpoint in {self.directory} is intact: {len(self._damaged)} are damaged "
                f"({reasons}); restore the files from a backup, or choose another directory to "
                "start afresh"
            )
        for entry in self._skipped:
            logging.warning("%s", entry)
        return chosen

    def _intact(self, step: int) -> int:
        """Returns a step that has an intact checkpoint."""
        path = self.directory / str(step)
        steps = sorted(committed(self.directory))
        if step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(
                f"{self.directory} has no checkpoint of step {step}; it has {known}"
            )
        reason = damage(path)
        if reason is not None:
            raise CheckpointError(f"checkpoint {path} is damaged ({reason}): choose another step")
        return step

    def _make_room(self, step: int) -> int:
        """Moves damaged checkpoints aside and returns whether the directory of ``step`` is free."""
        damaged, self._damaged = self._damaged, {}
        path = self.directory / str(step)
        if path.exists() and step not in damaged:
            reason = damage(path)
            if reason is None:
                return _OCCUPIED
            damaged[step] = reason
        for old, reason in damaged.items():
            move_aside(self.directory / str(old), reason)
        return _MOVED if damaged else _FREE


def add_packed(directory: str | epath.PathLike, step: int, packed: PackedLeaves) -> None:
    """Adds quantised weights to a finished checkpoint that lacks them, with their checksum.

    Args:
        directory: Directory of the step directories, which no run uses yet.
        step: Step of the checkpoint.
        packed: Quantised weights.
    """
    path = epath.Path(directory) / str(step)
    packed.write(Path(path))
    write_integrity(path)


def _silence_orbax() -> None:
    """Hides Orbax's log of a failed save, unless the log level is ``debug``.

    Each of Orbax's threads logs the same error with a stack trace, a thousand lines in all, and
    also raises it. The one line of ``CheckpointError`` replaces this log.
    """
    logger = logging.get_absl_logger()
    if _is_wanted not in logger.filters:
        logger.addFilter(_is_wanted)


def _is_wanted(record: stdlib_logging.LogRecord) -> bool:
    of_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
    return not of_orbax or logging.level_debug() or record.levelno < stdlib_logging.ERROR


def _parted(like: PyTree, packed: Collection[str]) -> tuple[dict[str, Any], PyTree]:
    """Returns the arrays that a file of quantised weights holds, and the arrays of Orbax."""
    if not packed:
        return {}, like
    parted = {name: leaf for name, leaf in like.items() if name in packed}
    return parted, {name: leaf for name, leaf in like.items() if name not in packed}


def _loading(partial: bool) -> contextlib.AbstractContextManager:
    context = ocp.Context()
    context.pytree_options.loading.partial_load = partial
    return context
