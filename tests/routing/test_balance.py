"""Losses by hand."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.routing import (
    LoadBalance,
    SecondBalance,
    Softmax,
    TokenBalance,
    TopK,
    TopTokens,
    ZLoss,
)
from moe_jax.routing.balance import Balance

Array = np.ndarray
T, F = True, False


def value(part: Balance, scores: Array, valid: list[bool] | None = None, k: int = 1) -> float:
    """Returns the loss for scores ``(S, E)`` whose tokens take their ``k`` best experts."""
    scores = np.array(scores, np.float32)
    valid = np.ones(len(scores), bool) if valid is None else np.array(valid)
    selection = TopK(k)(scores, valid, capacity=1, rng=None)
    return float(part(scores, scores, selection, valid))


# Tokens 0 and 1 prefer expert 0, token 2 prefers expert 1.
SCORES = [[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]]


def test_switch_loss():
    # f = (2/3, 1/3), P = (1.5/3, 1.5/3): 2 * (2/3 * 1/2 + 1/3 * 1/2) = 1.
    assert value(LoadBalance(), SCORES) == pytest.approx(1)
    # Token 2 as token 0: f = (1, 0), P = (2.2/3, 0.8/3): 2 * 2.2/3.
    assert value(LoadBalance(), [SCORES[0], SCORES[1], SCORES[0]]) == pytest.approx(4.4 / 3)


def test_one_expert_for_all_costs_as_many_times_as_there_are_experts():
    assert value(LoadBalance(), [[1, 0, 0, 0]] * 5) == pytest.approx(4)


# Each expert is the first choice of one token and the second of another, and all means are 1/4.
EVEN = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.3, 0.2], [0.2, 0.1, 0.4, 0.3], [0.3, 0.2, 0.1, 0.4]]


@pytest.mark.parametrize("padding", ["masked", "diluted", "counted"])
def test_uniform_routing_costs_one(padding: str):
    assert value(LoadBalance(padding=padding), EVEN) == pytest.approx(1)


def test_all_choices_at_uniform_routing_cost_k():
    assert value(LoadBalance(choices="all"), EVEN, k=2) == pytest.approx(2)
    assert value(LoadBalance(choices="first"), EVEN, k=2) == pytest.approx(1)


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
    ],
)
def test_padding_in_the_switch_loss(padding: str, expected: float):
    part, scores = LoadBalance(padding=padding), [*SCORES, [0.2, 0.8]]
    assert value(part, scores, [T, T, T, F]) == pytest.approx(expected)


@pytest.mark.parametrize("padding", ["masked", "diluted", "counted"])
def test_a_group_of_padding_costs_nothing(padding: str):
    assert value(LoadBalance(padding=padding), SCORES, [F, F, F]) == 0


def test_wishes_count_before_any_is_dropped():
    # The selection knows no capacity: five wishes for one expert are five, whatever its slots.
    assert value(LoadBalance(), [[0.7, 0.3]] * 5) == pytest.approx(1.4)


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


def test_token_balance():
    # Softmax over tokens: mean scores (0.5, 0.3, 0.2), so 3 * (0.25 + 0.09 + 0.04).
    scores = [[0.6, 0.4], [0.2, 0.4], [0.2, 0.2]]
    assert value(TokenBalance(), scores) == pytest.approx(3 * 0.38)
    assert value(TokenBalance(), [[0.25, 0.25]] * 4) == pytest.approx(1)
    # Two of the four are padding, and the two others share each column.
    even = [[0.5, 0.5], [0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]
    assert value(TokenBalance(), even, [T, T, F, F]) == pytest.approx(1)


def test_z_loss_is_over_valid_tokens():
    # exp sums to 2, then 6; the padded token would add log(8) ** 2.
    logits = np.log(np.array([[1, 1], [2, 4], [4, 4]], np.float32))
    z = ZLoss()(logits, logits, None, np.array([T, T, F]))
    np.testing.assert_allclose(z, (np.log(2) ** 2 + np.log(6) ** 2) / 2, rtol=1e-6)
    assert ZLoss()(logits, logits, None, np.zeros(3, bool)) == 0


def test_no_gradient_flows_through_the_fraction():
    # With f fixed, dL/dlogit[s, e] = E / S * p[s, e] * (f[e] - sum_j f[j] p[s, j]).
    logits = np.log(np.array(SCORES, np.float32))
    valid = np.ones(3, bool)

    def loss(logits: jax.Array) -> jax.Array:
        scores = Softmax()(logits, valid)
        return LoadBalance()(logits, scores, TopK(1)(scores, valid, capacity=1, rng=None), valid)

    p, f = np.array(SCORES), np.array([2 / 3, 1 / 3])
    expected = 2 / 3 * p * (f - (p @ f)[:, None])
    np.testing.assert_allclose(jax.grad(loss)(logits), expected, rtol=1e-5, atol=1e-7)


def test_load_balance_refuses_experts_that_choose():
    scores, valid = np.array(SCORES, np.float32), np.ones(3, bool)
    selection = TopTokens()(scores, valid, capacity=1, rng=None)
    with pytest.raises(ConfigError, match="TopTokens .*even by construction"):
        LoadBalance()(scores, scores, selection, valid)
