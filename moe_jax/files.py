"""Atomic writes of files, and errors that name the file and the remedy."""

from __future__ import annotations

import contextlib
import errno
import json
import math
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
    """Returns the advice for a full disk, or "" for any other failure of a write."""
    return _REMEDY if error.errno in _FULL else ""


def check_folder(path: Path, name: str) -> None:
    """Rejects a path that cannot be a folder for output; the check creates nothing.

    Args:
        path: The folder, which need not exist.
        name: Name of the flag with the path, for messages.

    Raises:
        ConfigError: If a parent is a file or is not writable; the message names it.
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
    """Rejects a path that cannot be an output file; the check creates nothing.

    Args:
        path: The file, which need not exist.
        name: Name of the flag with the path, for messages.

    Raises:
        ConfigError: If the path is a folder, or a parent is a file or is not writable; the message
            names it.
    """
    if path.is_dir():
        raise ConfigError(f"{name}={path} is a folder: name a file in it")
    check_folder(path.parent, name)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds ``path`` to the errors of writes in the block; Python names only files that it opens.

    Raises:
        WriteError: Instead of any other ``OSError``.
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
    """Yields a temporary path beside ``path``, and renames it to ``path`` after the block.

    If the block fails, the temporary file is removed and ``path`` is unchanged.

    Raises:
        WriteError: If the write fails.
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
    """A file that grows by whole records: a failed write leaves no part of its record."""

    def __init__(self, path: Path):
        """Opens the file, and creates it if it does not exist.

        Raises:
            WriteError: If the file cannot be opened.
        """
        self._path = path
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)

    def write(self, record: bytes) -> None:
        """Appends a record and passes it to the operating system.

        Raises:
            WriteError: If the write fails.
        """
        size = os.fstat(self._file.fileno()).st_size
        with naming(self._path):
            try:
                remaining = memoryview(record)
                while remaining:
                    remaining = remaining[self._file.write(remaining) :]
            except OSError:
                self._file.truncate(size)
                raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes ``value`` as JSON; a failed write leaves the old file.

    Raises:
        WriteError: If the write fails.
    """
    text = json.dumps(value, indent=1) + "\n"
    with replaced(path) as temporary:
        temporary.write_text(text)


def finite(value: Any) -> Any:
    """Returns nested dicts and lists with ``None`` for numbers that JSON lacks, such as NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
