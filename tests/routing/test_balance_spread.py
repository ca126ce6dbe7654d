"""Losses on the spread over experts and on logits alone, by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import Entropy, Importance, Load, TokenBalance, TopK, ZLoss
from tests.routing.helpers import inputs, scored
from tests.routing.test_balance_load import EVEN, SCORES, F, T, value


def test_importance_of_gates():
    # Gates 0.8 + 0.6 and 0.9: mean 1.15, deviations 0.25.
    assert value(Importance(), SCORES) == pytest.approx(0.25**2 / 1.15**2, rel=1e-5)
    assert value(Importance(), EVEN, k=2) == pytest.approx(0, abs=1e-10)
    # Without token 1: 0.8 and 0.9, mean 0.85.
    assert value(Importance(), SCORES, [T, F, T]) == pytest.approx(0.05**2 / 0.85**2, rel=1e-5)


def test_importance_of_scores():
    # All scores sum to 1.5 for each expert.
    assert value(Importance(of="scores"), SCORES) == pytest.approx(0, abs=1e-10)
    # Without token 2: 1.4 and 0.6, mean 1, deviations 0.4.
    assert value(Importance(of="scores"), SCORES, [T, T, F]) == pytest.approx(0.16, rel=1e-5)


def test_importance_of_scores_is_without_noise():
    made = scored([[0.9, 0.1]], noise_std=[[1, 1]], clean=[[0.5, 0.5]])
    given = inputs(made.noisy)
    assert Importance(of="scores")(made, TopK(1)(made, given), given) == 0
    assert Importance()(made, TopK(1)(made, given), given) == pytest.approx(1, rel=1e-5)


def test_load_without_noise_counts_choices():
    # Two tokens and one: mean 1.5, deviations 0.5.
    assert value(Load(), SCORES) == pytest.approx(1 / 9, rel=1e-5)
    assert value(Load(), EVEN, k=2) == pytest.approx(0, abs=1e-10)


# One token, three experts: noisy logits 1, 0.5 and 0, deviation 0.5, so expert 0 was chosen.
CLEAN, NOISY = jnp.array([[0.8, 0.7, 0.0]]), jnp.array([[1.0, 0.5, 0.0]])


def smooth_load(part: Load, clean: jax.Array) -> jax.Array:
    made = scored(jax.nn.softmax(NOISY), noise_std=jnp.full((1, 3), 0.5), noisy=NOISY)
    given = inputs(clean)
    return part(made, TopK(1)(made, given), given)


@pytest.mark.parametrize(
    ("excluding", "first"),
    [
        # Expert 0 beats the best of the others, 0.5, with probability Phi(0.3 / 0.5).
        (True, 0.725747),
        # Against the best of all, its own noisy 1: Phi(-0.2 / 0.5).
        (False, 0.344578),
    ],
)
def test_load_counts_the_probability_of_being_chosen(excluding: bool, first: float):
    # The other two against 1: Phi(-0.3 / 0.5) and Phi(-1 / 0.5).
    won = np.array([first, 0.274253, 0.022750])
    expected = won.var() / won.mean() ** 2
    part = Load(excluding=excluding)
    np.testing.assert_allclose(smooth_load(part, CLEAN), expected, rtol=1e-4)
    # It falls if the least wanted expert is wanted more.
    gradient = jax.grad(lambda clean: smooth_load(part, clean))(CLEAN)
    assert gradient[0, 2] < 0


def test_spreads_of_padding_alone_are_zero():
    for part in (Importance(), Importance(of="scores"), Load()):
        assert value(part, SCORES, [F, F, F]) == 0


def test_token_balance():
    # Softmax over tokens: mean scores (0.5, 0.3, 0.2), so 3 * (0.25 + 0.09 + 0.04).
    scores = [[0.6, 0.4], [0.2, 0.4], [0.2, 0.2]]
    assert value(TokenBalance(), scores) == pytest.approx(3 * 0.38)
    assert value(TokenBalance(), [[0.25, 0.25]] * 4) == pytest.approx(1)
    # Two of the four are padding, and the two others share each column.
    even = [[0.5, 0.5], [0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]
    assert value(TokenBalance(), even, [T, T, F, F]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("padding", "total", "tokens"),
    # Sums of exponentials 2 and 6; the padded token of logits log 4 has 2 if they are zeroed.
    [
        ("masked", np.log(2) ** 2 + np.log(6) ** 2, 2),
        ("zeroed", 2 * np.log(2) ** 2 + np.log(6) ** 2, 3),
    ],
)
def test_z_loss(padding: str, total: float, tokens: int):
    logits = np.log([[1, 1], [2, 4], [4, 4]])
    z = ZLoss(padding=padding)(scored(logits), None, inputs(logits, [T, T, F]))
    np.testing.assert_allclose(z, total / tokens, rtol=1e-6)


def test_z_loss_of_padding_alone():
    given = inputs(np.log([[4, 4], [4, 4]]), [F, F])
    assert ZLoss()(scored([[0, 0]]), None, given) == 0
    assert ZLoss().weight == 1e-3  # ST-MoE, section 3.3
    np.testing.assert_allclose(
        ZLoss(padding="zeroed")(scored([[0, 0]]), None, given), np.log(2) ** 2
    )


def test_entropy():
    # log 2 for an even token, 0 for a sure one, 1/4 log 4 + 3/4 log 4/3 for the third.
    scores, third = [[0.5, 0.5], [1, 0], [0.25, 0.75]], 0.5623351
    assert value(Entropy(), scores) == pytest.approx((np.log(2) + third) / 3, rel=1e-5)
    assert value(Entropy(), scores, [T, T, F]) == pytest.approx(np.log(2) / 2, rel=1e-5)
