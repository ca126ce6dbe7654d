"""Rules of the learning rates of experts, by hand, and their settings."""

import numpy as np
import pytest

from moe_jax.config.expert_rates import ExpertRates
from moe_jax.config.loading import experiment_of
from moe_jax.errors import ConfigError

TOKENS = np.array([4.0, 1.0, 16.0, 0.0, 9.0, 6.0], np.float32)  # their mean is 6


def test_factors_by_hand():
    np.testing.assert_allclose(ExpertRates("linear").factors(TOKENS), TOKENS / 6, rtol=1e-6)
    np.testing.assert_allclose(ExpertRates("sqrt").factors(TOKENS), np.sqrt(TOKENS / 6), rtol=1e-6)


def test_the_surge_is_the_ratio_of_the_best_rates():
    # With n = 4, the best rate of b tokens is proportional to 1 / (sqrt(4 / b) + sqrt(b / 4)):
    # 1 / 2 at 4 tokens, 1 / 2.5 at 1 and at 16, and 1 / (sqrt(2 / 3) + sqrt(3 / 2)) at the mean 6.
    found = ExpertRates("surge", noise_tokens=4.0).factors(TOKENS)
    mean = np.sqrt(2 / 3) + np.sqrt(3 / 2)
    np.testing.assert_allclose(found[:4], [mean / 2, mean / 2.5, mean / 2.5, 0], rtol=1e-6)
    assert float(found[5]) == pytest.approx(1)


@pytest.mark.parametrize("rule", ["sqrt", "linear", "surge"])
def test_equal_or_unused_experts_keep_the_rate_of_the_run(rule):
    rates = ExpertRates(rule, noise_tokens=4.0 if rule == "surge" else 0.0)
    for tokens in (np.full(3, 7.0, np.float32), np.zeros(3, np.float32)):
        np.testing.assert_allclose(rates.factors(tokens), np.ones(3), rtol=1e-6)
    # Each layer of a stack has a mean of its own.
    np.testing.assert_allclose(rates.factors(np.array([[2.0, 2.0], [5.0, 5.0]])), np.ones((2, 2)))


RULE, NOISE = "optimizer.expert_rates.rule", "optimizer.expert_rates.noise_tokens"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({RULE: "cube"}, "cube"),
        ({RULE: "surge"}, "noise_tokens belongs to the rule surge"),
        ({RULE: "sqrt", NOISE: 4.0}, "noise_tokens belongs to the rule surge"),
        ({RULE: "sqrt", "model.moe.every": 0}, "needs trained experts"),
        ({RULE: "sqrt", "optimizer.frozen": ("experts",)}, "needs trained experts"),
        ({RULE: "sqrt", "model.lora.groups": ("attention",)}, "needs trained experts"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        experiment_of("quickstart", settings)
    assert "\n" not in str(error.value)
