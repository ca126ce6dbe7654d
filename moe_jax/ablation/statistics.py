"""Statistics of registered ablations: pooled variances, and looks at a growing number of seeds.

The rules and their reasons are in ``experiments/registration.md``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from scipy import optimize, special, stats

from moe_jax.ablation.intervals import Interval

# Smallest effect of interest in nats: a smaller printed effect is below resolution.
SMALLEST_EFFECT = 0.010
# Largest weight of the pooled variance, in degrees of freedom. With few contrasts, a spread of
# variances that is small by chance would otherwise make one variance of all.
_MOST_PRIOR = 4.0


@dataclasses.dataclass(frozen=True)
class Look:
    """One of several looks at the same claim.

    Attributes:
        seeds: Number of paired seeds.
        level: Two-sided level of the interval.
    """

    seeds: int
    level: float


# The looks of O'Brien and Fleming (1979) have the levels .0005, .0141 and .0451. The last two are
# smaller here, since a pooled variance also contains the claim's own: a simulation of ablations
# without effects then has at most 2.5 % wrong directions.
LOOKS = (Look(4, 0.0005), Look(8, 0.0115), Look(12, 0.036))


@dataclasses.dataclass(frozen=True)
class VariancePrior:
    """Scaled inverse chi-square distribution of the variances of an ablation's differences.

    Attributes:
        variance: Typical variance of the difference of two arms at one seed.
        freedom: Degrees of freedom that the typical variance is worth; 0 without a prior.
    """

    variance: float = 0.0
    freedom: float = 0.0


def variance_prior(contrasts: Iterable[Sequence[float]]) -> VariancePrior:
    """Returns the prior of variances, fitted to differences by their log-variances.

    Source: Smyth (2004), section 6.2 (limma). The degrees of freedom are at most 4.

    Args:
        contrasts: Paired differences of two arms, by seed; one without variance does not count.
    """
    logs, shapes = [], []
    for values in contrasts:
        spread = float(np.var(values, ddof=1)) if len(values) > 1 else 0.0
        if spread > 0.0:
            shapes.append((len(values) - 1) / 2)
            logs.append(math.log(spread) - special.digamma(shapes[-1]) + math.log(shapes[-1]))
    if len(logs) < 2:
        return VariancePrior()
    excess = float(np.var(logs, ddof=1) - np.mean(special.polygamma(1, shapes)))
    half = _MOST_PRIOR / 2
    if excess > special.polygamma(1, half):
        half = _inverse_trigamma(excess)
    mean = float(np.mean(logs)) + float(special.digamma(half)) - math.log(half)
    return VariancePrior(math.exp(mean), 2 * half)


def _inverse_trigamma(value: float) -> float:
    return float(optimize.brentq(lambda x: special.polygamma(1, x) - value, 1e-6, _MOST_PRIOR))


def moderated_interval(values: Sequence[float], prior: VariancePrior, level: float) -> Interval:
    """Returns the mean of paired differences and its interval.

    The variance is the mean of the contrast's own variance and of the prior's, weighted by their
    degrees of freedom (Smyth 2004, equation 3).

    Args:
        values: Differences of two arms, at least two.
        prior: Prior of their variance.
        level: Two-sided level, such as 0.05 for an interval of 95 %.
    """
    own = len(values) - 1
    freedom = prior.freedom + own
    spread = float(np.var(values, ddof=1))
    variance = (prior.freedom * prior.variance + own * spread) / freedom
    quantile = float(stats.t.ppf(1 - level / 2, freedom))
    half_width = quantile * math.sqrt(variance / len(values))
    return Interval(float(np.mean(values)), half_width, len(values))


def contrasts(
    by_arm: Mapping[str, Mapping[int, float]],
    seeds: Collection[int],
    weights: Mapping[str, str] | None = None,
) -> list[list[float]]:
    """Returns the differences of all pairs of arms over those seeds that both arms have.

    Args:
        by_arm: Values of each arm by seed.
        seeds: Seeds that count.
        weights: Arm that has trained the weights of each arm, by default the arm itself. Two arms
            that evaluate the same weights have no difference of training, and no contrast.
    """
    trained = {arm: arm for arm in by_arm} | dict(weights or {})
    pairs = [(a, b) for a, b in itertools.combinations(by_arm, 2) if trained[a] != trained[b]]
    both = ((by_arm[a], by_arm[b]) for a, b in pairs)
    return [[a[seed] - b[seed] for seed in seeds if seed in a and seed in b] for a, b in both]
