"""Gaps between groups of documents, with intervals that allow for the choice of the groups."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

FEWEST = 5  # documents of a group with an interval
_LEVEL = 0.95


def gap_of_ratio(
    over: np.ndarray, under: np.ndarray, labels: np.ndarray, names: Sequence[str], name: str
) -> dict[str, Any]:
    """Returns the gap between the groups of the largest and of the smallest ratio of sums.

    The documents are the units: the variance of a ratio is the jackknife's, which leaves out one
    document at a time. The interval is the one of Games and Howell (1976), from the studentized
    range: it holds for all pairs of groups at once, so that it holds for the pair with the largest
    gap too. Groups may differ in size and in variance. Degrees of freedom are rounded down.

    Args:
        over: Numerator ``(documents,)`` of each document.
        under: Denominator ``(documents,)`` of each document.
        labels: Group ``(documents,)`` of each document.
        names: Name of each group, at least two.
        name: Name of the ratio.

    Returns:
        The groups ``worst`` and ``best``, their gap under ``name``, its ``interval`` of 95%, the
        ``fewest`` documents of the two groups, and ``uneven``: whether the interval is above 0.
        With fewer than 5 documents the interval and ``uneven`` are ``None``.
    """
    groups = [labels == group for group in range(len(names))]
    ratios = [over[own].sum() / max(under[own].sum(), 1) for own in groups]
    order = np.argsort(ratios, kind="stable")
    best, worst = int(order[0]), int(order[-1])
    gap, sizes = float(ratios[worst] - ratios[best]), [int(groups[i].sum()) for i in (worst, best)]
    errors = [_variance(over[groups[i]], under[groups[i]]) for i in (worst, best)]
    width = _half_width(errors, sizes, len(names)) if min(sizes) >= FEWEST else None
    return {
        "worst": names[worst],
        "best": names[best],
        name: gap,
        "interval": None if width is None else [gap - width, gap + width],
        "fewest": min(sizes),
        "uneven": None if width is None else gap > width,
    }


def in_words(gap: dict[str, Any]) -> list[str]:
    """Returns one line for each gap, with its interval or the reason why there is none."""
    kinds = [("drops", "dropped"), ("unrouted", "unrouted")]
    lines = [f"gap of {kind} {_words(gap[kind], gap[kind][key], '{:.2%}')}" for kind, key in kinds]
    if "bits_per_byte" in gap:
        lines.insert(0, f"gap {_words(gap, gap['bits_per_byte'], '{:.3f}', ' bits per byte')}")
    return lines


def _words(gap: dict[str, Any], value: float, form: str, unit: str = "") -> str:
    start = f"{gap['worst']} - {gap['best']}: {form.format(value)}{unit}, "
    if gap["interval"] is None:
        return f"{start}no interval: a group has {gap['fewest']} documents, fewer than {FEWEST}"
    low, high = map(form.format, gap["interval"])
    finding = ": the service is uneven" if gap["uneven"] else ""
    return f"{start}95% interval {low} to {high}{finding}"


def _variance(over: np.ndarray, under: np.ndarray) -> float:
    """Returns the jackknife's variance of the ratio of the sums over ``(documents,)``."""
    left = (over.sum() - over) / np.maximum(under.sum() - under, 1)
    return float((len(over) - 1) / max(len(over), 1) * np.square(left - left.mean()).sum())


def _half_width(variances: Sequence[float], sizes: Sequence[int], groups: int) -> float:
    """Returns half of the width of the interval of one pair among so many groups."""
    total = sum(variances)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(v**2 / (n - 1) for v, n in zip(variances, sizes, strict=True))
    return _quantile(groups, math.floor(freedom)) * math.sqrt(total / 2)


@functools.cache
def _quantile(groups: int, freedom: int) -> float:
    """Returns the quantile of the studentized range of so many groups."""
    return float(stats.studentized_range.ppf(_LEVEL, groups, freedom))
