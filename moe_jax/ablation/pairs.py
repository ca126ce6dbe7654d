"""Every pair of arms of a printed table, beside the measured differences of the same arms."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import stats

from moe_jax.ablation.ablation import Ablation, Claim, Published
from moe_jax.ablation.derived import IN_NATS, RATIOS, Records, by_arm, paired, values_of
from moe_jax.ablation.intervals import Interval
from moe_jax.ablation.judgement import failed_gates
from moe_jax.ablation.statistics import SMALLEST_EFFECT
from moe_jax.ablation.verdicts import UNTESTABLE, first_decided

CONCORDANT, DISCORDANT, UNRESOLVED = "concordant", "discordant", "open"
BELOW = "below resolution"
READINGS = (CONCORDANT, DISCORDANT, UNRESOLVED, BELOW, UNTESTABLE)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two arms whose printed numbers differ.

    Attributes:
        low: Arm with the lower printed number, in the sign of the metric.
        high: Other arm.
        published: Printed difference ``high - low``, above 0.
        measured: Measured difference over the common seeds, with its interval.
    """

    low: str
    high: str
    published: float
    measured: Interval

    def reading(self, in_nats: bool) -> str:
        """Returns whether the whole interval has the printed sign, the other one, or neither."""
        if in_nats and self.published < SMALLEST_EFFECT:
            return BELOW
        if not abs(self.measured.mean) > self.measured.half_width:  # nor with a loss of NaN
            return UNRESOLVED
        return CONCORDANT if self.measured.mean > 0 else DISCORDANT


@dataclasses.dataclass(frozen=True)
class TableAgreement:
    """The agreement of the runs with a printed table.

    Attributes:
        paper: Printed table.
        pairs: Every pair of arms with different printed numbers and at least two common seeds.
        tau: Kendall's tau-b of printed numbers and measured means; ``None`` for two arms.
        slope: Slope of the line through printed (x) and measured (y) numbers by least squares.
        testable: Whether the runs pass the gates of the ablation.
    """

    paper: Published
    pairs: tuple[Pair, ...]
    tau: float | None
    slope: float
    testable: bool = True

    @property
    def readings(self) -> dict[Pair, str]:
        """Reading of each pair."""
        if not self.testable:
            return dict.fromkeys(self.pairs, UNTESTABLE)
        # In nats, effects below ``SMALLEST_EFFECT`` are not tested.
        in_nats = self.paper.measures in IN_NATS
        return {pair: pair.reading(in_nats) for pair in self.pairs}

    @property
    def counts(self) -> str:
        """Number of pairs with each reading, in words."""
        found = collections.Counter(self.readings.values())
        return ", ".join(f"{found[kind]} {kind}" for kind in READINGS if found[kind])


def agreements(ablation: Ablation, records: Records) -> list[TableAgreement]:
    """Returns the agreement with each printed table that the runs measure too.

    A table of speeds or of times has no agreement, since the runs share a machine. Arms without
    the metric are left out. The pairs of a registered ablation have the intervals of its looks.

    Args:
        ablation: Ablation of the records.
        records: Lines of ``results.jsonl``, with the metrics of ``with_thresholds``.
    """
    found = (_agreement(ablation, paper, records) for paper in ablation.published)
    return [table for table in found if table is not None]


def _agreement(ablation: Ablation, paper: Published, records: Records) -> TableAgreement | None:
    metric = paper.measures
    if metric is None or metric in RATIOS:
        return None
    arms = {
        arm: lines
        for arm, lines in by_arm(ablation, records).items()
        if arm in paper.values and len(values_of(lines, metric)) > 1
    }
    pairs = tuple(_pairs(paper, arms, metric, records if ablation.registered else ()))
    if not pairs:
        return None
    printed = [paper.measured[arm] for arm in arms]
    means = _means([values_of(lines, metric) for lines in arms.values()])
    tau = float(stats.kendalltau(printed, means).statistic) if len(arms) > 2 else None
    slope = float(stats.linregress(printed, means).slope)
    return TableAgreement(paper, pairs, tau, slope, not failed_gates(ablation, records))


def _means(arms: Sequence[Mapping[int, float]]) -> list[float]:
    """Returns the mean of each arm over the seeds that all arms have, or over its own if none."""
    common = set.intersection(*(set(arm) for arm in arms))
    return [float(np.mean([arm[seed] for seed in sorted(common or arm)])) for arm in arms]


def _pairs(
    paper: Published, arms: Mapping[str, Records], metric: str, pooled: Records
) -> Iterator[Pair]:
    """Yields the pairs; ``pooled`` has the records of a registered ablation."""
    for pair in itertools.combinations(arms, 2):
        low, high = sorted(pair, key=lambda arm: paper.measured[arm])
        published = paper.effect(metric, low, high)
        measured = paired(arms[high], arms[low], metric)
        if published and measured is not None:
            if pooled:
                measured = first_decided(Claim("", metric, low, high), pooled)
            yield Pair(low, high, published, measured)
