"""Claims against measurements: an effect with its interval, and what it says."""

from __future__ import annotations

import dataclasses

from moe_jax.ablation.ablation import Claim
from moe_jax.ablation.derived import DERIVED, Records, diverged, paired, values_of
from moe_jax.ablation.intervals import Interval

REPRODUCED, CONTRADICTED, OPEN = "reproduced", "contradicted", "not resolved at this scale"
MISSING = "no verdict: fewer than two seeds of both arms"
# What a run that diverged is worse in than any other.
_LOSSES = ("loss", "best_loss", "train_loss", "excess_loss", "bits_per_byte", *DERIVED)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the runs say of a claim.

    Attributes:
        claim: the claim.
        effect: ``high - low`` by paired seeds, with its 95 % interval; none if all seeds of one
            arm diverged.
        text: one of ``REPRODUCED``, ``CONTRADICTED`` and ``OPEN``, and which arm diverged if that
            decides; ``OPEN`` too if a seed lacks the metric in one arm, as when it never reaches a
            threshold.
    """

    claim: Claim
    effect: Interval | None
    text: str

    @property
    def measured(self) -> str:
        """The effect in words, empty if it has no number."""
        return str(self.effect or "")


def judge(claim: Claim, records: Records) -> Verdict | None:
    """Returns the verdict, or ``None`` if there are not two seeds of both arms.

    Args:
        claim: about two arms.
        records: lines of ``results.jsonl``; those without the claim's metric do not count.
    """
    low, high = ([line for line in records if line["arm"] == a] for a in (claim.low, claim.high))
    if decided := _by_divergence(claim, low, high):
        return Verdict(claim, None, decided)
    effect = paired(high, low, claim.metric)
    if effect is None:
        return None
    seeds = {line["seed"] for line in low} & {line["seed"] for line in high}
    has_all = all(seeds <= values_of(arm, claim.metric).keys() for arm in (low, high))
    return Verdict(claim, effect, _verdict(claim, effect) if has_all else OPEN)


def _by_divergence(claim: Claim, low: Records, high: Records) -> str | None:
    """A loss that all seeds of one arm lose is above any that the other arm's seeds end with."""
    if claim.metric not in _LOSSES or min(len(low), len(high)) < 2:
        return None
    lost = {arm: [diverged(line) for line in mine] for arm, mine in (("low", low), ("high", high))}
    if all(lost["high"]) and not any(lost["low"]):
        return f"{CONTRADICTED if claim.within else REPRODUCED}: {claim.high} diverges"
    if all(lost["low"]) and not any(lost["high"]):
        return f"{CONTRADICTED}: {claim.low} diverges"
    return None


def _verdict(claim: Claim, effect: Interval) -> str:
    """The whole interval must be on one side of the margin."""
    mean = abs(effect.mean) if claim.within else effect.mean
    least, most = mean - effect.half_width, mean + effect.half_width
    holds = most <= claim.margin if claim.within else least > claim.margin
    fails = least > claim.margin if claim.within else most < claim.margin
    return REPRODUCED if holds else CONTRADICTED if fails else OPEN
