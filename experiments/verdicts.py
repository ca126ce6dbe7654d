"""Claims against measurements: an effect with its interval, and what it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from experiments.ablation import Claim
from experiments.derived import paired
from experiments.statistics import Interval

REPRODUCED, CONTRADICTED, OPEN = "reproduced", "contradicted", "not resolved at this scale"
MISSING = "no verdict: fewer than two seeds of both arms"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the runs say of a claim.

    Attributes:
        claim: the claim.
        effect: ``high - low`` by paired seeds, with its 95 % interval.
        text: one of ``REPRODUCED``, ``CONTRADICTED`` and ``OPEN``.
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
    return None if effect is None else Verdict(claim, effect, _verdict(claim, effect))


def _verdict(claim: Claim, effect: Interval) -> str:
    """The whole interval must be on one side of the margin."""
    mean = abs(effect.mean) if claim.within else effect.mean
    least, most = mean - effect.half_width, mean + effect.half_width
    holds = most <= claim.margin if claim.within else least > claim.margin
    fails = least > claim.margin if claim.within else most < claim.margin
    return REPRODUCED if holds else CONTRADICTED if fails else OPEN
