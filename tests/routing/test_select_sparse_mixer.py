"""SparseMixer by hand: who may be drawn, the gates, and the gradient of the choice."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.routing import SparseMixer, preset
from moe_jax.routing.select.sparse_mixer import one_draw
from tests.routing.helpers import select

ALL = jnp.ones((1, 3), bool)
LOGITS = jnp.array([[1.0, 0.9, 0.5]])


def test_evaluation_takes_the_best_among_those_that_are_close():
    # Within a tenth of the larger of both: 0.1 is, 0.5 is not. Gate e^1 / (e^1 + e^0.9).
    expert, gate = one_draw(LOGITS, ALL, 0.05 + 1e-6, None)
    assert int(expert[0, 0]) == 0
    np.testing.assert_allclose(gate, [[1 / (1 + np.exp(-0.1))]], rtol=1e-6)
    # Alone in reach, the gate is 1; without the best, the second best is the best.
    np.testing.assert_allclose(one_draw(LOGITS, ALL, 0.04, None)[1], [[1]])
    expert, gate = one_draw(LOGITS, ALL.at[0, 0].set(False), 0.04, None)
    assert int(expert[0, 0]) == 1 and float(gate[0, 0]) == 1


def test_two_experts_one_after_the_other():
    # Scores are exponentials of the logits 1, 0.9 and 0.5. The second expert is drawn without the
    # first, and its gate is over those close to it: alone.
    choice = select(SparseMixer(2, 0.06), np.exp(np.asarray(LOGITS)))
    np.testing.assert_array_equal(choice.expert, [[0, 1]])
    np.testing.assert_allclose(choice.gate, [[1 / (1 + np.exp(-0.1)), 1]], rtol=1e-5)


def test_draws_follow_the_softmax_and_three_quarters_of_others_count_a_third():
    # 20,000 draws of the logits 1 and 0.9; rates within 4.9 standard deviations.
    n = 20_000
    logits, left = jnp.tile(LOGITS, (n, 1)), jnp.ones((n, 3), bool)
    expert, gate = one_draw(logits, left, 0.06, jax.random.key(0))
    first, p = np.asarray(expert)[:, 0] == 0, 1 / (1 + np.exp(-0.1))
    assert abs(first.mean() - p) < 4.9 * np.sqrt(p * (1 - p) / n)
    np.testing.assert_allclose(np.asarray(gate)[first, 0], p, rtol=1e-5)
    others = np.asarray(gate)[~first, 0]
    third = others < 0.3
    np.testing.assert_allclose(others[third], (1 - p) / 3, rtol=1e-5)
    np.testing.assert_allclose(others[~third], 1 - p, rtol=1e-5)
    assert abs(third.mean() - 0.75) < 4.9 * np.sqrt(0.75 * 0.25 / len(others))
    assert set(np.asarray(expert)[:, 0]) == {0, 1}


def test_the_gradient_is_that_of_the_whole_probability():
    # p_e (1 - p_e) at the drawn expert and the opposite at the other one, for every draw, whether
    # the gate counts as a third or not; experts out of reach have none.
    p = 1 / (1 + np.exp(-0.1))
    seen = set()
    for seed in range(30):
        key = jax.random.key(seed)
        expert, gate = one_draw(LOGITS, ALL, 0.06, key)
        slope = jax.grad(lambda x, key=key: one_draw(x, ALL, 0.06, key)[1].sum())(LOGITS)
        sign = 1 if int(expert[0, 0]) == 0 else -1
        np.testing.assert_allclose(slope, [[sign * p * (1 - p), -sign * p * (1 - p), 0]], rtol=1e-4)
        seen.add(round(float(gate[0, 0]), 3))
    assert len(seen) == 3  # the best, another one, and a third of it


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ConfigError, match="k=3 experts per token, but there are 2 experts"):
        preset("phimoe", k=3).check(2)
