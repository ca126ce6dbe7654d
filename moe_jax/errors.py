"""Errors a user can act on: one line that says what is wrong and what to change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """The configuration cannot work; the message is one line and names the remedy."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'? Known: ..."`` for a message about an unknown ``name``."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} known: {', '.join(known)}" if known else "; there are none"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message is one line and names the remedy."""


def line_of(error: Exception) -> str:
    """Returns the first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
