"""Claims against measurements: an effect with its interval, and what it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from experiments.ablation import Claim
from experiments.derived import paired, values_of
from experiments.statistics import Interval

REPRODUCED, CONTRADICTED, OPEN = "reproduced", "contradicted", "not resolved at this scale"
MISSING = "no verdict: fewer than two seeds of both arms"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the runs say of a claim.

    Attributes:
        claim: the claim.
        effect: ``high - low`` by paired seeds, with its 95 % interval.
        text: one of ``REPRODUCED``, ``CONTRADICTED`` and ``OPEN``; the last too if a seed lacks
            the metric in one arm, as when it never reaches a threshold.
    """

    claim: Claim
    effect: Interval
    text: str


def judge(claim: Claim, records: Sequence[dict[str, Any]]) -> Verdict | None:
    """Returns the verdict, or ``None`` if there are not two seeds of both arms.

    Args:
        claim: about two arms.
        records: lines of ``results.jsonl``; those without the claim's metric do not count.
    """
    low, high = ([line for line in records if line["arm"] == a] for a in (claim.low, claim.high))
    effect = paired(high, low, claim.metric)
    if effect is None:
        return None
    seeds = {line["seed"] for line in low} & {line["seed"] for line in high}
    has_all = all(seeds <= values_of(arm, claim.metric).keys() for arm in (low, high))
    return Verdict(claim, effect, _verdict(claim, effect) if has_all else OPEN)


def _verdict(claim: Claim, effect: Interval) -> str:
    """The whole interval must be on one side of the margin."""
    mean = abs(effect.mean) if claim.within else effect.mean
    least, most = mean - effect.half_width, mean + effect.half_width
    holds = most <= claim.margin if claim.within else least > claim.margin
    fails = least > claim.margin if claim.within else most < claim.margin
    return REPRODUCED if holds else CONTRADICTED if fails else OPEN
