"""Folders of checkpoints: committed steps, leftovers of killed runs, damaged steps."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath

from moe_jax.errors import CheckpointError, line_of
from moe_jax.training.integrity import INTEGRITY_FILE


def steps_of(directory: str | epath.PathLike) -> list[int]:
    """Returns the committed steps in ``directory``, unverified, newest first."""
    return list(committed(epath.Path(directory)))


def latest_step(directory: str | epath.PathLike) -> int | None:
    """Returns the newest committed step in ``directory``, unverified; ``None`` without any."""
    return next(committed(epath.Path(directory)), None)


def identity(directory: str | epath.PathLike) -> str:
    """Returns a hash of the newest checkpoint's content; it does not depend on the directory.

    Raises:
        CheckpointError: If there is no checkpoint, or its checksums cannot be read.
    """
    step = latest_step(directory)
    try:
        record = (epath.Path(directory) / str(step) / INTEGRITY_FILE).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"no checkpoint in {directory} can be read: {line_of(error)}; train first"
        ) from error
    return hashlib.sha256(record).hexdigest()[:16]


def require_writable(directory: epath.Path) -> None:
    """Creates the directory and writes a probe into it.

    Raises:
        CheckpointError: If the directory cannot be written.
    """
    probe = directory / f".write-test-{jax.process_index()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot write checkpoints to {directory}: {line_of(error)}; "
            "choose a writable directory with free space"
        ) from error


def committed(directory: epath.Path) -> Iterator[int]:
    """Yields the steps whose directory has its final name, newest first."""
    if directory.is_dir():
        names = [path.name for path in directory.iterdir() if path.name.isdigit()]
        yield from sorted((int(name) for name in names if name == str(int(name))), reverse=True)


def unfinished(directory: epath.Path) -> Iterator[tuple[int, str, str]]:
    """Yields step, path and reason of each checkpoint that was never committed."""
    if directory.is_dir():
        for path in directory.iterdir():
            step, dot, suffix = path.name.partition(".")
            if step.isdigit() and dot and "tmp" in suffix:
                yield int(step), str(path), "its save did not finish"


def move_aside(path: epath.Path, reason: str) -> None:
    """Renames a damaged step to ``corrupt-<step>-<n>`` and logs the reason."""
    if not path.exists():
        return
    names = (path.parent / f"corrupt-{path.name}-{n}" for n in itertools.count(1))
    target = next(name for name in names if not name.exists())
    path.rename(target)
    logging.warning(
        "damaged checkpoint %s (%s) moved to %s; delete it when no longer needed",
        path,
        reason,
        target.name,
    )
