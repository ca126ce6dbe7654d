"""Coefficients of laws, recovered from losses that follow them."""

import numpy as np
import pytest

from moe_jax.counting.fits import expert_slope, granularity_exponent
from moe_jax.counting.laws import HASH, MOE, S_BASE
from moe_jax.errors import ConfigError

EXPERTS, PARTS = [1, 4, 16, 64], [1, 2, 4, 8, 16]


@pytest.mark.parametrize("law", [S_BASE, HASH])
@pytest.mark.parametrize("params", [15e6, 1.3e9])
def test_a_law_has_its_own_slope_in_experts(law, params):
    losses = law.loss(params, np.array(EXPERTS))
    assert expert_slope(EXPERTS, losses, law) == pytest.approx(law.expert_slope(params), rel=1e-9)


def test_the_slope_of_a_small_model_is_the_one_of_table_3():
    # log10 of 15M is 7.176, so -0.108 + 0.009 * 7.176 = -0.0434.
    assert S_BASE.expert_slope(15e6) == pytest.approx(-0.0434, abs=1e-4)


def test_equal_losses_have_no_slope():
    assert expert_slope([1, 64], [2.0, 2.0]) == pytest.approx(0, abs=1e-12)


def test_a_law_has_its_own_exponent_of_granularity():
    losses = MOE.loss(64e6, 16e9, np.array(PARTS))
    assert granularity_exponent(PARTS, losses) == pytest.approx(MOE.gamma, rel=1e-3)


def test_an_exponent_without_noise_is_found_by_hand():
    # loss = 2 + 1 / G
    assert granularity_exponent([1, 2, 4], [3.0, 2.5, 2.25]) == pytest.approx(1.0, rel=1e-3)


def test_a_loss_that_falls_once_has_the_largest_exponent():
    assert granularity_exponent([1, 2, 4, 8], [3.0, 2.0, 2.0, 2.0]) == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize(
    ("fit", "places"), [(expert_slope, [4, 4]), (granularity_exponent, [1, 2, 2])]
)
def test_too_few_places_are_refused(fit, places):
    with pytest.raises(ConfigError, match="different values"):
        fit(places, [3.0] * len(places))
