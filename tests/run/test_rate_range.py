"""A range test: its experiment, its curve and its suggestion."""

import json

import numpy as np
import pytest

from moe_jax.config.experiment import Experiment
from moe_jax.config.schedules import ExponentialRise
from moe_jax.errors import ConfigError
from moe_jax.run.rate_range import rate_curve, rising, table, write_range


def records(rates, losses):
    pairs = zip(rates, losses, strict=True)
    lines = [{"kind": "train", "learning_rate": rate, "loss": loss} for rate, loss in pairs]
    return [*lines, {"kind": "eval", "loss": 0.0}]


# In tenths of a decade, the loss falls with the learning rate up to 0.1, and then rises alike.
RATES = np.logspace(-4, 0, 41)
LOSSES = 2 + np.abs(np.log10(RATES / 0.1))


def test_the_experiment_of_a_test():
    found = rising(Experiment("x"), 50, 1e-4, 0.5)
    assert found.optimizer.schedule == ExponentialRise(2e-4)
    assert (found.optimizer.learning_rate, found.optimizer.warmup_steps) == (0.5, 0)
    assert (found.training.steps, found.training.log_every) == (50, 1)


@pytest.mark.parametrize(("first", "last"), [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0)])
def test_a_rate_that_does_not_rise_is_refused(first, last):
    with pytest.raises(ConfigError, match="--first=.* must be above 0 and below --last"):
        rising(Experiment("x"), 50, first, last)


def test_the_smoothed_loss_is_the_average_of_neighbours():
    curve = rate_curve(records([1, 2, 3, 4], [9.0, 2.0, 3.0, 10.0]))
    np.testing.assert_allclose(curve.smoothed, [5.5, 14 / 3, 5.0, 6.5])
    # Of 80 losses, a window has two neighbours on each side.
    curve = rate_curve(records(range(80), [(i - 40) ** 2 for i in range(80)]))
    assert curve.smoothed[50] == np.mean([64, 81, 100, 121, 144])
    assert curve.smoothed[0] == np.mean([1600, 1521, 1444])


def test_the_suggestion_is_a_tenth_of_the_rate_with_the_lowest_smoothed_loss(tmp_path):
    curve = rate_curve(records(RATES, LOSSES))
    assert curve.rates[curve.lowest] == pytest.approx(0.1)
    assert curve.suggestion == pytest.approx(0.01)
    text = table(curve)
    assert "0.1    2.0000" in text and text.count("lowest\n") == 1
    assert "--config.optimizer.learning_rate=0.01," in text
    write_range(curve, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "lr_range.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 42))
    np.testing.assert_allclose([line["learning_rate"] for line in lines], RATES)
    assert (tmp_path / "lr_range.png").read_bytes().startswith(b"\x89PNG")


def test_losses_that_are_not_finite_end_the_curve():
    losses = [*LOSSES[:35], *[None] * 6]
    assert len(rate_curve(records(RATES, losses)).rates) == 35


@pytest.mark.parametrize(
    ("losses", "advice"),
    [
        ([1.0, 2.0, 3.0], "lower --first"),
        ([3.0, 2.0, 1.0], "raise --last"),
        ([None], "lower --fir"),
    ],
)
def test_a_range_without_the_best_rate_is_one_line(losses, advice):
    with pytest.raises(ConfigError, match=advice):
        rate_curve(records(range(1, len(losses) + 1), losses))
