"""Paired comparisons over seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
# Largest number of values of an interval.
MOST = len(_T95) + 1


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval.

    Attributes:
        mean: Mean of the values.
        half_width: Half-width of the interval.
    """

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half_width:.4f}"


def interval(values: Sequence[float]) -> Interval:
    """Returns the mean and 95 % interval (Student's t) of 2 to 11 values.

    Raises:
        ValueError: There are fewer than 2 or more than 11 values.
    """
    if not 2 <= len(values) <= MOST:
        raise ValueError(f"an interval needs 2 to {MOST} values, got {len(values)}")
    deviation = float(np.std(values, ddof=1))
    half_width = _T95[len(values) - 2] * deviation / math.sqrt(len(values))
    return Interval(float(np.mean(values)), half_width)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Returns the interval of ``ours - theirs``, seed by seed."""
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])
