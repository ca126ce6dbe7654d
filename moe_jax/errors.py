"""Errors that a user can act on: one line names the fault and the remedy."""

from __future__ import annotations

import difflib
import os
import re
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

# Messages of Python and absl for a text that is no value, and their plain form.
_PARSERS = (
    (r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number"),
    (r"could not convert string to float: (.*)", r"\1 is not a number"),
    (r"\('Non-boolean argument to boolean flag', (.*?)\)", r"\1 is not True or False"),
    (r"Non-boolean argument to boolean flag", "the value is not True or False"),
    (r"value should be one of <(.*)>", r"the value is not one of \1"),
)


class ConfigError(ValueError):
    """A setting is unknown or wrong; the message is one line and names the remedy.

    Examples:
        >>> import moe_jax as mj
        >>> try:
        ...     mj.experiment("quickstart", {"model.wdith": 64})
        ... except mj.ConfigError as error:
        ...     print(str(error).split(" known")[0])
        config.model.wdith is not a setting; did you mean 'width'?
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end ``"; did you mean 'x'? known: ..."`` of a message about an unknown name.

    Args:
        name: The unknown name.
        known: All known names.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} known: {', '.join(known)}" if known else "; there are none"


class TrainingError(RuntimeError):
    """Training cannot continue; the message is one line and names the remedy.

    Examples:
        >>> import moe_jax as mj
        >>> issubclass(mj.Diverged, mj.TrainingError)
        True
    """


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message is one line and names the remedy.

    Examples:
        >>> import moe_jax as mj
        >>> issubclass(mj.CheckpointError, mj.TrainingError)
        False
    """


def line_of(error: BaseException) -> str:
    """Returns the first line of an error's message, or the error's type if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def plain(text: str) -> str:
    """Returns a message with the words of parsers, such as those of ``int``, in plain ones."""
    for pattern, instead in _PARSERS:
        text = re.sub(pattern, instead, text)
    return text


def fault_in(file: str | Path, error: BaseException) -> str | None:
    """Returns file, line, type and message of an error that a Python file of the user raised.

    Args:
        file: The file.
        error: The error that loading the file raised; another library may have wrapped it.

    Returns:
        One line, or ``None`` if the error does not come from this file.
    """
    for one in _chain(error):
        if isinstance(one, SyntaxError) and one.filename and _same(one.filename, file):
            return f"{file}, line {one.lineno}: {type(one).__name__}: {one.msg}"
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(one.__traceback__)
            if _same(frame.filename, file)
        ]
        if lines:
            return f"{file}, line {lines[-1]}: {type(one).__name__}: {' '.join(str(one).split())}"
    unread = next((one for one in _chain(error) if _no_text(one)), None)
    return None if unread is None else f"{file}: {type(unread).__name__}: {line_of(unread)}"


def _no_text(error: BaseException) -> bool:
    """Returns True if Python cannot read a file as text, so that the error names no line."""
    nameless = isinstance(error, SyntaxError) and error.filename is None
    # Python 3.11.3 and earlier raise a ValueError for a file with a null byte.
    null = isinstance(error, ValueError) and "null bytes" in str(error)
    return nameless or null or isinstance(error, UnicodeDecodeError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the first cause of an error, then the error that it caused, and so on."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return reversed(chain)


def _same(one: str, other: str | Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
