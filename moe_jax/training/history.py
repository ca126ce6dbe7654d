"""What a checkpoint remembers of its run beside the state: logged steps and the tokenizer.

The weights do not depend on the log, so a log that has lost lines does not end a run; but the run
says which lines are missing, and so does its report.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from moe_jax import data

LOG, TOKENIZER = "log", "tokenizer"
_DIGITS = 16
_Ranges = list[list[int]]


class Logged:
    """The steps of each kind of record, as ranges ``[first, last, stride]``."""

    def __init__(self, ranges: Mapping[str, _Ranges] | None = None):
        """Starts with the ranges of a checkpoint."""
        self._ranges = {
            kind: [list(one) for one in found] for kind, found in (ranges or {}).items()
        }

    @property
    def ranges(self) -> dict[str, _Ranges]:
        """A copy for a checkpoint; of JSON's types."""
        return {kind: [list(one) for one in found] for kind, found in self._ranges.items()}

    def add(self, kind: str, step: int) -> None:
        """Notes a record; steps of a kind come in order."""
        found = self._ranges.setdefault(kind, [])
        if found and step <= found[-1][1]:
            return
        if found and found[-1][0] == found[-1][1]:
            found[-1][1:] = step, step - found[-1][0]
        elif found and step == found[-1][1] + found[-1][2]:
            found[-1][1] = step
        else:
            found.append([step, step, 0])

    def missing(self, found: Collection[tuple[str, int]]) -> list[tuple[str, int]]:
        """Returns kinds and steps that are noted here and not in ``found``."""
        noted = (
            (kind, step)
            for kind, ranges in self._ranges.items()
            for first, last, stride in ranges
            for step in range(first, last + 1, stride or 1)
        )
        return [record for record in noted if record not in found]


def spans(steps: Iterable[int]) -> str:
    """Returns numbers in words: ``steps 3 to 20``, or ``9 steps of 3 to 20`` with gaps."""
    ordered = sorted(set(steps))
    first, last = ordered[0], ordered[-1]
    if first == last:
        return f"step {first}"
    strides = {b - a for a, b in zip(ordered, ordered[1:], strict=False)}
    return f"{'steps' if len(strides) == 1 else f'{len(ordered)} steps of'} {first} to {last}"


def digest(tokenizer: data.Tokenizer) -> str:
    """Returns what names a tokenizer by its content."""
    about = ""
    while isinstance(tokenizer, data.WithSentinels | data.WithSpareIds):
        about += f"{type(tokenizer).__name__} {tokenizer.vocab_size} "
        tokenizer = tokenizer.base
    about += f"{type(tokenizer).__name__} {tokenizer.vocab_size} "
    return hashlib.sha256(about.encode() + getattr(tokenizer, "model", b"")).hexdigest()[:_DIGITS]


def split(saved: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the position in the data that a checkpoint holds, and the rest of its notes."""
    notes = {name: saved[name] for name in (LOG, TOKENIZER) if name in saved}
    return {name: part for name, part in saved.items() if name not in notes}, notes
