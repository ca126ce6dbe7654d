"""Files that are written whole or not at all, and errors that name the file and the remedy."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_jax.errors import ConfigError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REMEDY = "make space, then run the same command to go on"


class WriteError(OSError):
    """A file cannot be written; the message is one line that names it and the remedy."""


def remedy(error: OSError) -> str:
    """Returns what to do about a refused write, or "" where only the reason tells."""
    return _REMEDY if error.errno in _FULL else ""


def check_folder(path: Path, name: str) -> None:
    """Refuses a path that cannot be a folder to write in; nothing is made.

    Args:
        path: the folder, which need not exist.
        name: of the flag that gives it.

    Raises:
        ConfigError: naming the file or folder that is in the way.
    """
    folder = path
    while not folder.exists() and not folder.is_symlink() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ConfigError(
            f"{name}={path} cannot be a folder, as {folder} is a file: use another {name}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{name}={path} cannot be written, as {folder} is not writable: change its "
            f"permissions, or use another {name}"
        )


def check_file(path: Path, name: str) -> None:
    """Refuses a path at which no file can be written; nothing is made.

    Args:
        path: the file, which need not exist.
        name: of the flag that gives it.

    Raises:
        ConfigError: naming the file or folder that is in the way.
    """
    if path.is_dir():
        raise ConfigError(f"{name}={path} is a folder: name a file in it")
    check_folder(path.parent, name)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names ``path`` in the error of a write to it; Python itself names only files it opens.

    Raises:
        WriteError: instead of any other ``OSError``.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        advice = remedy(error) or "make it writable, then run the same command to go on"
        reason = error.strerror or str(error)
        raise WriteError(f"{path} cannot be written ({reason}): {advice}") from error


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that takes its place at the end of the block.

    Where the block fails, the temporary file is removed and ``path`` is as it was.

    Raises:
        WriteError: if the disk refuses.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class Appended:
    """A file that grows by whole records: where the disk refuses one, nothing of it is left."""

    def __init__(self, path: Path):
        """Opens the file, and makes it if it is missing.

        Raises:
            WriteError: if the disk refuses.
        """
        self._path = path
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)

    def write(self, record: bytes) -> None:
        """Appends a record, and hands it to the operating system.

        Raises:
            WriteError: if the disk refuses.
        """
        size = os.fstat(self._file.fileno()).st_size
        with naming(self._path):
            try:
                left = memoryview(record)
                while left:
                    left = left[self._file.write(left) :]
            except OSError:
                self._file.truncate(size)
                raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes ``value`` so that the file is either old or new, never half.

    Raises:
        WriteError: if the disk refuses.
    """
    text = json.dumps(value, indent=1) + "\n"
    with replaced(path) as temporary:
        temporary.write_text(text)
