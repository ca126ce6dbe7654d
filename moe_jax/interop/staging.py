"""A folder that appears whole or not at all, in the place of an older one if there is one."""

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
    """Yields an empty folder that takes the place of ``directory`` once the block has ended.

    If the block raises, the new folder is removed and the older one stays untouched; a command
    raises for Ctrl-C and SIGTERM too (``moe_jax.signals``). A process that is killed leaves a
    hidden folder beside it, which the next writer on the same machine removes.

    Args:
        directory: the folder.
        stale: whether a file of this name in the older folder goes; the others stay.

    Raises:
        ConfigError: if ``directory`` is a file.
        OSError: if the folder cannot be written.
    """
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file, not a folder: give another output folder")
    # A folder that is a mount point cannot be renamed: its files are then moved one by one.
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
    """Refuses a disk that has less than ``size`` bytes free for ``directory``.

    Raises:
        ConfigError: naming the free and the needed size.
    """
    directory = Path(directory).resolve()
    place = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(place).free
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
    """Moves files one by one: names of weights go first and come last."""
    for old in sorted(directory.iterdir(), key=_is_description, reverse=True):
        if old != new and stale(old.name):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    for file in sorted(new.iterdir(), key=_is_description):
        os.replace(file, directory / file.name)


def _is_description(path: Path) -> bool:
    return path.suffix == ".json"


def _link(old: Path, new: Path) -> None:
    """Gives a file or a folder of files a second name; a file system without links copies."""

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
    """Removes new folders whose writer was killed, and moves an older folder back."""
    prefix = _prefix(name)
    for path in list(parent.glob(f"{prefix}*")):
        writer = path.name.removeprefix(prefix).partition(".")[0]
        if not writer.isdigit() or _lives(int(writer)):
            continue
        if path.suffix == ".old" and not (parent / name).exists():
            os.rename(path, parent / name)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
