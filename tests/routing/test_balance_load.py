"""Losses of load times score, by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.routing import (
    CommunicationBalance,
    DeviceBalance,
    Entropy,
    LoadBalance,
    SecondBalance,
    Softmax,
    TokenBalance,
    TopK,
)
from moe_jax.routing.balance import Balance
from tests.routing.helpers import inputs, scored

Array = np.ndarray
T, F = True, False


def value(part: Balance, scores, valid=None, k: int = 1, **state) -> float:
    """Returns the loss for scores ``(S, E)`` whose tokens take their ``k`` best experts."""
    made = scored(scores)
    given = inputs(made.noisy, valid, **state)
    return float(part(made, TopK(k)(made, given), given))


# Tokens 0 and 1 prefer expert 0, token 2 prefers expert 1.
SCORES = [[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]]
# Each expert is the first choice of one token and the second of another, and all means are 1/4.
EVEN = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.3, 0.2], [0.2, 0.1, 0.4, 0.3], [0.3, 0.2, 0.1, 0.4]]
every_padding = pytest.mark.parametrize("padding", ["masked", "diluted", "counted", "unsent"])


def test_switch_loss():
    # f = (2/3, 1/3), P = (1.5/3, 1.5/3): 2 * (2/3 * 1/2 + 1/3 * 1/2) = 1.
    assert value(LoadBalance(), SCORES) == pytest.approx(1)
    # Token 2 as token 0: f = (1, 0), P = (2.2/3, 0.8/3): 2 * 2.2/3.
    assert value(LoadBalance(), [SCORES[0], SCORES[1], SCORES[0]]) == pytest.approx(4.4 / 3)


def test_one_expert_for_all_costs_as_many_times_as_there_are_experts():
    assert value(LoadBalance(), [[1, 0, 0, 0]] * 5) == pytest.approx(4)


@every_padding
def test_uniform_routing_costs_one(padding: str):
    assert value(LoadBalance(padding=padding), EVEN) == pytest.approx(1)


@pytest.mark.parametrize(("choices", "expected"), [("first", 1), ("all", 2), ("mean", 1)])
def test_two_choices_at_uniform_routing(choices: str, expected: float):
    assert value(LoadBalance(choices=choices), EVEN, k=2) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        # First choices (1, 1, 0) / 2, all (2, 1, 1) / 2; P = (0.45, 0.35, 0.2).
        ("first", 3 * (0.45 + 0.35) / 2),
        ("all", 3 * (0.9 + 0.35 + 0.2) / 2),
        ("mean", 3 * (0.9 + 0.35 + 0.2) / 4),
    ],
)
def test_which_choices_count(choices: str, expected: float):
    scores = [[0.6, 0.1, 0.3], [0.3, 0.6, 0.1]]
    assert value(LoadBalance(choices=choices), scores, k=2) == pytest.approx(expected)


def test_fractions_of_the_whole_batch():
    # P = (2.2/3, 0.8/3), and 1 of 4 tokens of the batch chose expert 0: 2 * (1.1 + 1.2) / 6.
    scores, part = [SCORES[0], SCORES[1], SCORES[0]], LoadBalance(choices="mean", over="batch")
    assert value(part, scores, batch_load=jnp.array([1.0, 3.0])) == pytest.approx(2.3 / 3)
    # The sum over two choices of each token is twice the mean.
    both = LoadBalance(choices="all", over="batch")
    load = {"batch_load": jnp.array([2.0, 6.0])}
    assert value(both, scores, k=2, **load) == pytest.approx(2 * 2.3 / 3)
    # Without counts, the tokens at hand are the batch: f = (1, 0).
    for state in ({}, {"batch_load": jnp.zeros(2)}):
        assert value(part, scores, **state) == pytest.approx(4.4 / 3)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "choices='first'"),
        ({"choices": "all", "padding": "diluted"}, "padding='diluted'"),
        ({"choices": "mean", "ema": 0.9}, "ema=0.9"),
    ],
)
def test_fractions_of_the_whole_batch_reject_settings_that_they_ignore(settings, named):
    with pytest.raises(ConfigError, match=f"so {named} does not fit: use choices='mean'"):
        LoadBalance(over="batch", **settings)


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        # Without token 3: as in test_switch_loss.
        ("masked", 1.0),
        # f = (2/4, 1/4), P = (1.5/4, 1.5/4): 2 * 3/4 * 1.5/4.
        ("diluted", 2 * 3 / 4 * 1.5 / 4),
        # Token 3 counts: f = (2/4, 2/4), P = (1.7/4, 2.3/4): 2 * 2/4 * 4/4 = 1, of 4 tokens 3
        # are valid.
        ("counted", 0.75),
        # f = (2/4, 1/4), P = (1.7/4, 2.3/4).
        ("unsent", 2 * (2 * 1.7 + 2.3) / 16),
    ],
)
def test_padding_in_the_switch_loss(padding: str, expected: float):
    part, scores = LoadBalance(padding=padding), [*SCORES, [0.2, 0.8]]
    assert value(part, scores, [T, T, T, F]) == pytest.approx(expected)


@every_padding
def test_a_group_of_padding_costs_nothing(padding: str):
    assert value(LoadBalance(padding=padding), SCORES, [F, F, F]) == 0


@pytest.mark.parametrize(
    "part",
    [
        LoadBalance(),
        LoadBalance(per_token=True),
        SecondBalance(),
        DeviceBalance(devices=2),
        CommunicationBalance(devices=2),
        Entropy(),
        TokenBalance(),
    ],
    ids=repr,
)
def test_losses_read_the_scores_without_noise(part: Balance):
    # Noise raises the two best scores of each token and moves no choice: no loss may see it.
    clean = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.4, 0.3]]
    noisy = scored([[0.6, 0.35, 0.03, 0.02], [0.1, 0.1, 0.5, 0.3]], clean=clean)
    given = inputs(noisy.noisy)
    found = float(part(noisy, TopK(2)(noisy, given), given))
    assert found == pytest.approx(value(part, clean, k=2))


def test_wishes_count_before_any_is_dropped():
    # The selection knows no capacity: five wishes for one expert are five, whatever its slots.
    assert value(LoadBalance(), [[0.7, 0.3]] * 5) == pytest.approx(1.4)


def test_scores_per_token_are_divided_by_their_sum():
    # Sigmoids (0.8, 0.4) and (0.3, 0.1) are (2/3, 1/3) and (3/4, 1/4); both prefer expert 0.
    part, scores = LoadBalance(per_token=True), [[0.8, 0.4], [0.3, 0.1]]
    assert value(part, scores) == pytest.approx(2 * (2 / 3 + 3 / 4) / 2)
    assert value(LoadBalance(), scores) == pytest.approx(2 * 1.1 / 2)


def test_the_fraction_may_be_an_average_over_steps():
    part = LoadBalance(ema=0.9)
    # The state before the step stands for the group's own fraction (1, 0): 2 (3/4 0.6 + 1/4 0.4).
    assert value(part, [[0.6, 0.4]], load_ema=[0.75, 0.25]) == pytest.approx(1.1)
    assert part.state_shapes(2) == {"load_ema": (2,)} and LoadBalance().state_shapes(2) == {}
    # 3 of 4 tokens for expert 0: 0.9 * 0.5 + 0.1 * 0.75.
    state = {"load_ema": jnp.array([0.5, 0.5])}
    after = part.next_state(state, jnp.array([3.0, 1.0]))
    np.testing.assert_allclose(after["load_ema"], [0.525, 0.475], rtol=1e-6)
    assert np.isfinite(part.next_state(state, jnp.zeros(2))["load_ema"]).all()
    assert LoadBalance().next_state(state, jnp.ones(2)) is state
    with pytest.raises(ConfigError, match="LoadBalance.ema. needs state=.'load_ema'"):
        value(part, [[0.6, 0.4]])


def test_second_balance():
    # Second choices: experts 1, 0, 1, so fractions (1/3, 2/3, 0). Without the first choices the
    # rows are (0, 4, 0) / 4, (2, 0, 1) / 3 and (1, 2, 0) / 3.
    scores = [[0.6, 0.4, 0.0], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]]
    proxy = np.array([2 / 3 + 1 / 3, 1 + 2 / 3, 1 / 3]) / 3
    expected = 3 * np.dot([1 / 3, 2 / 3, 0], proxy)
    assert value(SecondBalance(), scores, k=2) == pytest.approx(expected, rel=1e-5)
    assert value(SecondBalance(), EVEN, k=2) == pytest.approx(1, rel=1e-5)
    # With row 1 as padding: fractions (0, 2/3, 0), and the row's own scores in the proxy.
    proxy = (1 + 0.7 + 2 / 3) / 3
    padded = value(SecondBalance(), scores, [T, F, T], k=2)
    assert padded == pytest.approx(3 * 2 / 3 * proxy, rel=1e-5)


def test_device_balance():
    # Two devices of two experts. Both tokens on expert 0: fractions 4 and 0 of the even share, so
    # the first device has mean 2; its experts have scores 0.4 + 0.3.
    lopsided = [[0.4, 0.3, 0.2, 0.1]] * 2
    assert value(DeviceBalance(devices=2), lopsided) == pytest.approx(2 * 0.7)
    # One token on each device, scores of 1/2 on each.
    even = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]
    assert value(DeviceBalance(devices=2), even) == pytest.approx(1)
    # Two choices per token: the second of each is on the same device.
    assert value(DeviceBalance(devices=2), even, k=2) == pytest.approx(1)
    # Token 1 is padding: as if both were token 0.
    assert value(DeviceBalance(devices=2), even, [T, F]) == pytest.approx(2 * 0.7)


def test_communication_balance():
    # Both choices of both tokens are on device 0, which therefore receives 2 / 1 of an even share
    # if tokens may visit one device, and 2 / 2 if they may visit two.
    lopsided = [[0.4, 0.3, 0.2, 0.1]] * 2
    assert value(CommunicationBalance(devices=2, keep=1), lopsided, k=2) == pytest.approx(1.4)
    assert value(CommunicationBalance(devices=2, keep=2), lopsided, k=2) == pytest.approx(0.7)
    # A choice on each device: both receive every token.
    spread = [[0.4, 0.2, 0.3, 0.1]] * 2
    assert value(CommunicationBalance(devices=2, keep=2), spread, k=2) == pytest.approx(1)


@pytest.mark.parametrize("part", [DeviceBalance(devices=3), CommunicationBalance(devices=3)])
def test_devices_must_divide_the_experts(part: Balance):
    with pytest.raises(ConfigError, match=f"{type(part).__name__}: 4 experts.*devices=3"):
        part.check(4)
    part.check(6)


def test_no_gradient_flows_through_the_fraction():
    # With f fixed, dL/dlogit[s, e] = E / S * p[s, e] * (f[e] - sum_j f[j] p[s, j]).
    def loss(logits: jax.Array) -> jax.Array:
        given = inputs(logits)
        made = Softmax()(given)
        return LoadBalance()(made, TopK(1)(made, given), given)

    p, f = np.array(SCORES), np.array([2 / 3, 1 / 3])
    expected = 2 / 3 * p * (f - (p @ f)[:, None])
    gradient = jax.grad(loss)(jnp.log(jnp.array(SCORES)))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)
