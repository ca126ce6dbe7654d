"""Pooled variances against hand-made cases, and the error of the whole rule by simulation."""

import numpy as np
import pytest
from scipy import stats

from moe_jax.ablation import statistics
from moe_jax.ablation.ablation import Claim
from moe_jax.ablation.statistics import (
    LOOKS,
    VariancePrior,
    contrasts,
    moderated_interval,
    variance_prior,
)
from moe_jax.ablation.verdicts import CONTRADICTED, OPEN, REPRODUCED, judge


def test_a_variance_is_the_mean_of_both_by_their_degrees_of_freedom():
    # The differences have variance 1 with 2 degrees of freedom. The prior has 4 with 4, so the
    # pooled variance is (4 * 4 + 2 * 1) / 6 = 3, with 6 degrees of freedom.
    found = moderated_interval([1.0, 2.0, 3.0], VariancePrior(4.0, 4.0), 0.05)
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(2.4469 * (3 / 3) ** 0.5, abs=1e-3)


def test_without_a_prior_it_is_students_interval():
    values = [0.1, 0.4, 0.2, 0.5]
    found = moderated_interval(values, VariancePrior(), 0.05)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(
        (low, high)
    )


def test_the_prior_recovers_a_distribution_of_variances():
    # Variances drawn with 3 degrees of freedom and scale 0.04; differences over 8 seeds.
    rng = np.random.default_rng(0)
    variances = 0.04 * 3 / rng.chisquare(3, 4000)
    prior = variance_prior(rng.standard_normal((4000, 8)) * np.sqrt(variances)[:, None])
    assert prior.freedom == pytest.approx(3, rel=0.1)
    assert prior.variance == pytest.approx(0.04, rel=0.1)


def test_equal_variances_are_pooled_by_the_largest_weight():
    prior = variance_prior(np.random.default_rng(1).standard_normal((2000, 8)))
    assert prior.freedom == 4.0


def test_contrasts_without_variance_and_single_ones_make_no_prior():
    assert variance_prior([[0.5, 0.5, 0.5], [1.0, 2.0, 4.0]]) == VariancePrior()
    assert variance_prior([[1.0], [2.0]]) == VariancePrior()


def test_contrasts_are_of_all_pairs_over_their_common_seeds():
    by_arm = {"a": {0: 3.0, 1: 4.0}, "b": {0: 1.0, 1: 1.0}, "c": {1: 2.0, 2: 9.0}}
    assert contrasts(by_arm, (0, 1)) == [[2.0, 3.0], [2.0], [-1.0]]


def test_arms_that_evaluate_the_same_weights_have_no_contrast():
    by_arm = {"a": {0: 3.0, 1: 4.0}, "a_at_2": {0: 1.0, 1: 1.0}, "b": {0: 0.0, 1: 2.0}}
    found = contrasts(by_arm, (0, 1), {"a": "a", "a_at_2": "a", "b": "b"})
    assert found == [[3.0, 2.0], [1.0, -1.0]]


def test_the_weights_of_an_arm_reach_the_variance_of_its_claims():
    # ``a_at_2`` differs from ``a`` by 1.0 and 1.1: a small variance that training does not have.
    values = {"a": (0.0, 1.0, 0.5, 2.0), "b": (1.0, 0.0, 1.5, 1.0), "a_at_2": (1.0, 2.1, 1.5, 3.1)}
    alike, apart = (
        [{**line, "weights": weights(line["arm"])} for line in lines(values)]
        for weights in (lambda arm: arm[0], lambda arm: arm)
    )
    claim = Claim("", "loss", "b", "a")
    widths = [judge(claim, records, "registered").effect.half_width for records in (alike, apart)]
    assert widths[0] != widths[1]


def lines(values):
    """Records of arms by name, each with one loss per seed."""
    return [
        {"arm": arm, "seed": seed, "loss": float(loss)}
        for arm, losses in values.items()
        for seed, loss in enumerate(losses)
    ]


CLAIM = Claim("", "loss", "low", "high")


def test_a_claim_is_open_before_the_first_look():
    values = {"low": [1.0, 2.0, 3.0], "high": [2.0, 3.001, 4.002]}
    assert judge(CLAIM, lines(values)).text == REPRODUCED
    assert judge(CLAIM, lines(values), registered="abc").text == OPEN


def test_the_first_decided_look_counts():
    """Four seeds decide, and the other eight, which say the opposite, change nothing."""
    rng = np.random.default_rng(2)
    low = rng.normal(0.0, 0.01, 12)
    high = low + np.where(np.arange(12) < 4, 1.0, -1.0) + rng.normal(0.0, 0.01, 12)
    found = judge(CLAIM, lines({"low": low, "high": high}), registered="abc")
    assert found.text == REPRODUCED
    assert found.effect.mean == pytest.approx(1.0, abs=0.02)
    assert judge(CLAIM, lines({"low": high, "high": low}), registered="abc").text == CONTRADICTED


def test_looks_between_two_numbers_of_seeds_use_the_smaller():
    rng = np.random.default_rng(3)
    values = {"low": rng.normal(0, 1, 7), "high": rng.normal(0, 1, 7)}
    four = {arm: losses[:4] for arm, losses in values.items()}
    found, expected = (judge(CLAIM, lines(v), registered="abc") for v in (values, four))
    assert found.effect == expected.effect


def decided(rng, arms, effect, noise_spread):
    """Returns 1, -1 or 0 for one simulated ablation of ``arms``, with an effect of one arm.

    Noise of a run has about the deviation of the committed runs, 0.009 nats; arms differ in it by
    a log-normal factor. Seeds shift all arms alike.
    """
    noise = 0.009 * np.exp(noise_spread * rng.standard_normal((arms, 1)))
    losses = rng.standard_normal((arms, 12)) * noise + 0.025 * rng.standard_normal(12)
    losses[1] += effect
    for look in LOOKS:
        values = {str(arm): dict(enumerate(row)) for arm, row in enumerate(losses)}
        prior = variance_prior(contrasts(values, range(look.seeds)))
        difference = (losses[1] - losses[0])[: look.seeds]
        found = moderated_interval(difference, prior, look.level)
        if abs(found.mean) > found.half_width:
            return int(np.sign(found.mean))
    return 0


@pytest.mark.parametrize(("arms", "spread"), [(2, 0.0), (4, 0.0), (8, 0.8)])
def test_arms_without_an_effect_are_rarely_reproduced(arms, spread):
    rng = np.random.default_rng(4)
    wrong = np.mean([decided(rng, arms, 0.0, spread) == 1 for _ in range(1500)])
    assert wrong <= 0.025 + 2 * (0.025 * 0.975 / 1500) ** 0.5


def test_power_is_as_registered():
    """An effect of 0.02 nats is found in at least nine of ten ablations of four arms."""
    rng = np.random.default_rng(5)
    assert np.mean([decided(rng, 4, 0.02, 0.4) == 1 for _ in range(300)]) > 0.9
    assert statistics.SMALLEST_EFFECT == 0.010
