"""Atomic replacement of a folder: the new folder appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_jax.errors import ConfigError


@contextlib.contextmanager
def replaced(
    directory: Path | str, stale: Callable[[str], bool] = lambda name: True
) -> Iterator[Path]:
    """Yields an empty folder that replaces ``directory`` at the end of the block.

    If the block raises, the new folder is removed and the old folder is unchanged; a command also
    raises for Ctrl-C and SIGTERM (``moe_jax.signals``). A killed process leaves a hidden folder
    beside ``directory``, and the next writer on the same machine removes it.

    Args:
        directory: Folder to replace.
        stale: Function that returns True for names of old files to remove; other files are kept.

    Raises:
        ConfigError: If ``directory`` is a file.
        OSError: If the folder cannot be written.
    """
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file, not a folder: give another output folder")
    # A mount point cannot be renamed, so its files are moved one by one.
    mounted = directory.is_mount()
    parent = directory if mounted else directory.parent
    parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(parent, directory.name)
    new = parent / f"{_prefix(directory.name)}{os.getpid()}.{uuid.uuid4().hex[:8]}"
    try:
        new.mkdir()
        yield new
        if mounted:
            _move_into(new, directory, stale)
        else:
            _swap(new, directory, stale)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def require_room(directory: Path | str, size: int) -> None:
    """Rejects a disk with fewer than ``size`` free bytes for ``directory``.

    Raises:
        ConfigError: If the disk is too full; the message names the free and the needed size.
    """
    directory = Path(directory).resolve()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise ConfigError(
            f"{directory} needs {size / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free: "
            "free some, or give another output folder"
        )


def _swap(new: Path, directory: Path, stale: Callable[[str], bool]) -> None:
    if not directory.exists():
        os.rename(new, directory)
        return
    for old in directory.iterdir():
        if not stale(old.name) and not (new / old.name).exists():
            _link(old, new / old.name)
    aside = new.with_name(f"{new.name}.old")
    os.rename(directory, aside)
    try:
        os.rename(new, directory)
    except BaseException:
        os.rename(aside, directory)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _move_into(new: Path, directory: Path, stale: Callable[[str], bool]) -> None:
    """Moves files one by one; the descriptions of weights are removed first and moved last."""
    for old in sorted(directory.iterdir(), key=_is_description, reverse=True):
        if old != new and stale(old.name):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    for file in sorted(new.iterdir(), key=_is_description):
        os.replace(file, directory / file.name)


def _is_description(path: Path) -> bool:
    return path.suffix == ".json"


def _link(old: Path, new: Path) -> None:
    """Links a file, or the files of a folder, to a second name; without links it copies them."""

    def one(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target)

    if old.is_dir() and not old.is_symlink():
        shutil.copytree(old, new, symlinks=True, copy_function=one)
    else:
        one(str(old), str(new))


def _prefix(name: str) -> str:
    return f".{name}.{socket.gethostname()}."


def _remove_leftovers(parent: Path, name: str) -> None:
    """Removes new folders of killed writers, and moves an old folder back."""
    prefix = _prefix(name)
    for path in list(parent.glob(f"{prefix}*")):
        writer = path.name.removeprefix(prefix).partition(".")[0]
        if not writer.isdigit() or lives(int(writer)):
            continue
        if path.suffix == ".old" and not (parent / name).exists():
            os.rename(path, parent / name)
        else:
            shutil.rmtree(path, ignore_errors=True)


def lives(process: int) -> bool:
    """Whether a process of this machine still runs; one that has ended but has no reaper does not.

    In a container whose first process is no init, an orphan stays in the process table as a zombie.
    """
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:  # not Linux, or the process has ended since
        return not Path("/proc/self/stat").exists()
    # The fields are: id, name in parentheses (which may hold any character), state, ...
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")
