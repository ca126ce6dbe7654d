"""Paired comparisons over seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval, of 95 % unless a look sets another level.

    Attributes:
        mean: Mean of the values.
        half_width: Half-width of the interval.
        seeds: Number of seeds of the look that sets the level; 0 for an interval of 95 %.
    """

    mean: float
    half_width: float
    seeds: int = 0

    def __str__(self) -> str:
        look = f" ({self.seeds} seeds)" if self.seeds else ""
        return f"{self.mean:+.4f} ± {self.half_width:.4f}{look}"


def interval(values: Sequence[float]) -> Interval:
    """Returns the mean and 95 % interval (Student's t) of at least two values.

    Raises:
        ValueError: There are fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"an interval needs at least 2 values, got {len(values)}")
    deviation = float(np.std(values, ddof=1))
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return Interval(float(np.mean(values)), quantile * deviation / math.sqrt(len(values)))


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Returns the interval of ``ours - theirs``, seed by seed."""
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])
