"""Notes of a checkpoint about its run: the logged steps, the tokenizer and the validations.

The weights do not depend on the log, so a run continues if its log has lost lines. The run and its
report then name the missing lines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from moe_jax import data

LOG, TOKENIZER, VALIDATIONS = "log", "tokenizer", "validations"
_DIGITS = 16
_Ranges = list[list[int]]


class Logged:
    """The steps of each kind of record, as ranges ``[first, last, stride]``."""

    def __init__(self, ranges: Mapping[str, _Ranges] | None = None):
        """Starts with the ranges of a checkpoint, by kind of record."""
        self._ranges = _copied(ranges or {})

    @property
    def ranges(self) -> dict[str, _Ranges]:
        """Copy of the ranges for a checkpoint, as JSON types."""
        return _copied(self._ranges)

    def add(self, kind: str, step: int) -> None:
        """Notes a record; the steps of a kind come in increasing order."""
        ranges = self._ranges.setdefault(kind, [])
        if ranges and step <= ranges[-1][1]:
            return
        if ranges and ranges[-1][0] == ranges[-1][1]:
            ranges[-1][1:] = step, step - ranges[-1][0]
        elif ranges and step == ranges[-1][1] + ranges[-1][2]:
            ranges[-1][1] = step
        else:
            ranges.append([step, step, 0])

    def missing(self, found: Collection[tuple[str, int]]) -> list[tuple[str, int]]:
        """Returns the noted records, as kind and step, that ``found`` lacks."""
        noted = (
            (kind, step)
            for kind, ranges in self._ranges.items()
            for first, last, stride in ranges
            for step in range(first, last + 1, stride or 1)
        )
        return [record for record in noted if record not in found]


def _copied(ranges: Mapping[str, _Ranges]) -> dict[str, _Ranges]:
    return {kind: [list(one) for one in of_kind] for kind, of_kind in ranges.items()}


def spans(steps: Iterable[int]) -> str:
    """Returns steps in words: ``steps 3 to 20``, or ``9 steps of 3 to 20`` if there are gaps."""
    ordered = sorted(set(steps))
    first, last = ordered[0], ordered[-1]
    if first == last:
        return f"step {first}"
    strides = {b - a for a, b in zip(ordered, ordered[1:], strict=False)}
    return f"{'steps' if len(strides) == 1 else f'{len(ordered)} steps of'} {first} to {last}"


def digest(tokenizer: data.Tokenizer) -> str:
    """Returns a hash of a tokenizer's content."""
    about = ""
    while isinstance(tokenizer, data.WithSentinels | data.WithSpareIds):
        about += f"{type(tokenizer).__name__} {tokenizer.vocab_size} "
        tokenizer = tokenizer.base
    about += f"{type(tokenizer).__name__} {tokenizer.vocab_size} "
    return hashlib.sha256(about.encode() + getattr(tokenizer, "model", b"")).hexdigest()[:_DIGITS]


def split(saved: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the data position and the other notes that a checkpoint saved together."""
    notes = {name: saved[name] for name in (LOG, TOKENIZER, VALIDATIONS) if name in saved}
    return {name: part for name, part in saved.items() if name not in notes}, notes
