"""Verdicts on claims, from measured effects and their intervals."""

from __future__ import annotations

import dataclasses

from moe_jax.ablation.ablation import Claim
from moe_jax.ablation.derived import DERIVED, Records, diverged, paired, values_of
from moe_jax.ablation.intervals import Interval
from moe_jax.ablation.statistics import LOOKS, contrasts, moderated_interval, variance_prior

REPRODUCED, CONTRADICTED, OPEN = "reproduced", "contradicted", "not resolved at this scale"
UNTESTABLE = "not testable here"
MISSING = "no verdict: fewer than two seeds of both arms"
# Metrics in which a diverged run counts as worse than any other run.
_LOSSES = ("loss", "best_loss", "train_loss", "excess_loss", "bits_per_byte", *DERIVED)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The verdict of the runs on a claim.

    Attributes:
        claim: Claim that the runs test.
        effect: Difference ``high - low`` over paired seeds, with its interval; ``None`` if all
            seeds of one arm diverged.
        text: Verdict in words: ``REPRODUCED``, ``CONTRADICTED``, ``OPEN`` or ``UNTESTABLE``, with
            the diverged arm or the failed gate that decides. The verdict is also ``OPEN`` if a
            seed lacks the metric in one arm, for example because the run never reaches a
            threshold.
    """

    claim: Claim
    effect: Interval | None
    text: str

    @property
    def measured(self) -> str:
        """Effect in words; empty without an effect."""
        return str(self.effect or "")


def judge(claim: Claim, records: Records, registered: str = "") -> Verdict | None:
    """Returns the verdict on a claim, or ``None`` with fewer than two seeds of both arms.

    Args:
        claim: Claim about two arms.
        records: Lines of ``results.jsonl``; lines without the metric of the claim do not count.
        registered: Commit that registered the claim. The verdict then is the first decided one of
            the looks of ``moe_jax.ablation.statistics``, with a pooled variance.
    """
    low, high = ([line for line in records if line["arm"] == a] for a in (claim.low, claim.high))
    if decided := _by_divergence(claim, low, high):
        return Verdict(claim, None, decided)
    effect = paired(high, low, claim.metric)
    if effect is None:
        return None
    seeds = {line["seed"] for line in low} & {line["seed"] for line in high}
    known = values_of(low, claim.metric).keys() & values_of(high, claim.metric).keys()
    has_all = seeds <= known
    if registered:
        effect = first_decided(claim, records)
        # Seeds after the look that decides change nothing.
        counted = sorted(seeds)[: effect.seeds]
        has_all = len(seeds) >= LOOKS[0].seeds and known.issuperset(counted)
    return Verdict(claim, effect, _verdict(claim, effect) if has_all else OPEN)


def first_decided(claim: Claim, records: Records) -> Interval:
    """Returns the effect at the first look that decides a claim, or else at the last look so far.

    With fewer seeds than the first look, the interval has the level of that look.

    Args:
        claim: Claim about two arms that have at least two common seeds.
        records: Records of all arms of the ablation, whose variances are pooled.
    """
    arms = dict.fromkeys(line["arm"] for line in records)
    values = {
        arm: values_of([line for line in records if line["arm"] == arm], claim.metric)
        for arm in arms
    }
    weights = {line["arm"]: line.get("weights", line["arm"]) for line in records}
    low, high = values[claim.low], values[claim.high]
    seeds = sorted(low.keys() & high.keys())
    for look in [look for look in LOOKS if look.seeds <= len(seeds)] or LOOKS[:1]:
        counted = seeds[: look.seeds]
        prior = variance_prior(contrasts(values, counted, weights))
        differences = [high[seed] - low[seed] for seed in counted]
        effect = moderated_interval(differences, prior, look.level)
        if _verdict(claim, effect) != OPEN:
            break
    return effect


def _by_divergence(claim: Claim, low: Records, high: Records) -> str | None:
    """Decides a claim about a loss if all seeds of one arm diverged and none of the other arm."""
    if claim.metric not in _LOSSES or min(len(low), len(high)) < 2:
        return None
    arms = {"low": low, "high": high}
    lost = {arm: [diverged(line) for line in lines] for arm, lines in arms.items()}
    if all(lost["high"]) and not any(lost["low"]):
        return f"{CONTRADICTED if claim.within else REPRODUCED}: {claim.high} diverges"
    if all(lost["low"]) and not any(lost["high"]):
        return f"{CONTRADICTED}: {claim.low} diverges"
    return None


def _verdict(claim: Claim, effect: Interval) -> str:
    """Returns the verdict; it is final only if the whole interval is on one side of the margin."""
    mean = abs(effect.mean) if claim.within else effect.mean
    least, most = mean - effect.half_width, mean + effect.half_width
    holds = most <= claim.margin if claim.within else least > claim.margin
    fails = least > claim.margin if claim.within else most < claim.margin
    return REPRODUCED if holds else CONTRADICTED if fails else OPEN
