"""Parts of a matrix of cases: `make test` runs some, `make exhaustive` all."""

from collections.abc import Sequence
from typing import Any

import pytest


def covering(rows: Sequence[Any], columns: Sequence[Any], part: int = 3) -> list[Any]:
    """Returns all pairs; those outside every ``part``-th diagonal are marked exhaustive.

    Every row and every column keeps a pair, as long as neither has fewer than ``part``.
    """
    return [
        pytest.param(row, column, marks=() if (i + j) % part == 0 else pytest.mark.exhaustive)
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]


def sample(cases: Sequence[Any], part: int = 3) -> list[Any]:
    """Returns all cases; those that are not every ``part``-th are marked exhaustive."""
    return [
        pytest.param(case, marks=() if i % part == 0 else pytest.mark.exhaustive)
        for i, case in enumerate(cases)
    ]
