"""The sum of the shares of the top scores, by hand, and plans that it leaves as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.routing.observing import TOP_SCORE, observing, top_share


def test_shares_by_hand_without_padding():
    # Softmax scores are 1/4 and 3/4, then 1/2 and 1/2; the third token is padding.
    logits = jnp.log(jnp.array([[1.0, 3.0], [5.0, 5.0], [1.0, 1e6]]))
    router = observing(routing.preset("switch"))
    counts = router(logits, valid=jnp.array([True, True, False])).counts
    assert counts.observed[TOP_SCORE] == pytest.approx(0.75 + 0.5)
    assert counts.valid == 2


def test_shares_of_scores_that_need_not_sum_to_one():
    # 0.9 of 0.9 + 0.6; equal scores; and scores below the smallest float32.
    scores = jnp.array([[0.9, 0.6], [0.2, 0.2]])
    np.testing.assert_allclose(top_share(jnp.log(scores)), [0.6, 0.5], rtol=1e-6)
    np.testing.assert_allclose(top_share(jnp.array([[-500.0, -500.0, -900.0]])), [0.5])


@pytest.mark.parametrize("name", ["gshard", "expert_choice", "deepseek_v3"])
def test_plans_and_sums_of_the_router_stay(name):
    router = routing.preset(name)
    logits = jax.random.normal(jax.random.key(0), (16, 64, router.planes))
    plain, watched = router(logits), observing(router)(logits)
    extra = watched.counts.observed.pop(TOP_SCORE)
    assert 16 / 64 <= extra <= 16
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), plain, watched))
