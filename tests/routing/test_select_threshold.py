"""Selections of all experts above a threshold, by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.routing import Active, Relu, Sigmoid, Threshold, preset
from tests.routing.helpers import inputs, jitted, normal, weights


def chosen(choice) -> list[dict[int, float]]:
    """The gates of the experts that each token wants."""
    rows = zip(*(np.asarray(x) for x in (choice.expert, choice.gate, choice.wanted)), strict=True)
    return [{int(e): round(float(g), 4) for e, g, w in zip(*row, strict=True) if w} for row in rows]


def test_active_takes_every_positive_score():
    given = inputs([[2, -1, 1], [-1, 3, -2], [-1, -1, 0]], [True, True, True])
    choice = Active()(Relu()(given), given)
    assert chosen(choice) == [{0: 2.0, 2: 1.0}, {1: 3.0}, {}]
    # Best first; padding wants nothing.
    np.testing.assert_array_equal(choice.expert[0], [0, 2, 1])
    given = inputs([[2, -1, 1], [3, 3, 3]], [True, False])
    assert chosen(Active()(Relu()(given), given)) == [{0: 2.0, 2: 1.0}, {}]


def test_active_gates_learn_and_inactive_ones_do_not():
    def total(logits: jax.Array) -> jax.Array:
        return preset("remoe")(logits, capacity=2).combine.sum()

    gradient = jax.grad(total)(jnp.array([[2.0, -1, 1], [-1, 3, -2]]))
    np.testing.assert_array_equal(gradient, [[1, 0, 1], [0, 1, 0]])


def test_a_threshold_is_of_each_expert():
    # Logits above 1 for expert 0 and above -1 for expert 1; the gates are sigmoids.
    given = inputs([[2, -2], [0, 0], [0, -2]], threshold=np.array([1.0, -1.0]))
    choice = Threshold()(Sigmoid()(given), given)
    assert chosen(choice) == [{0: 0.8808}, {1: 0.5}, {}]


def test_thresholds_find_the_cut_of_expert_choice():
    # Two of eight tokens per expert for k = 1 and four experts. After steps without inertia the
    # threshold of each expert is between its second and its third best logit.
    router, logits = preset("expert_threshold", k=1, decay=0.5), normal(4, 8, 4)
    logits += np.array([2.0, 0, 0, -2], np.float32)
    state = {"threshold": jnp.zeros(4)}
    run, valid = jitted(router, 8), np.ones(8, bool)
    for _ in range(30):
        counts = run(logits, valid, None, None, state).counts
        state = router.next_state(state, counts.demand, counts.observed)
    ordered = -np.sort(-logits, axis=0)
    threshold = np.asarray(state["threshold"])
    assert (ordered[2] - 1e-3 <= threshold).all() and (threshold <= ordered[1] + 1e-3).all()
    np.testing.assert_array_equal(run(logits, valid, None, None, state).counts.demand, [2] * 4)


def test_a_threshold_is_causal():
    # A token is routed alone as among others, with a key as without.
    router, logits = preset("expert_threshold"), normal(4, 8, 4)
    state = {"threshold": np.zeros(4, np.float32)}
    whole = jitted(router, 8)(logits, np.ones(8, bool), jax.random.key(0), None, state)
    alone = jitted(router, 8)(logits, np.arange(8) == 0, None, None, state)
    np.testing.assert_array_equal(weights(whole)[0], weights(alone)[0])


def test_thresholds_rest_without_tokens():
    part, state = Threshold(1, 0.5), {"threshold": jnp.array([0.5, 1.0])}
    seen = {"logits_above": jnp.zeros((2, 128)), "tokens": jnp.zeros(())}
    after = part.next_state(state, jnp.zeros(2), seen)
    np.testing.assert_array_equal(after["threshold"], state["threshold"])


def test_the_target_counts_as_the_number_of_experts_per_token():
    assert preset("remoe", k=3).experts_per_token(64, 8) == 3
    assert preset("expert_threshold", k=2).experts_per_token(64, 8) == 2
    # An even share of 64 tokens with two experts each is 16 of 8 experts' slots.
    assert preset("remoe", k=2, capacity_factor=1.0).slots(64, 8, train=True) == 16


@pytest.mark.parametrize("part", [Active(5), Threshold(5)])
def test_a_target_above_the_number_of_experts_is_refused(part):
    with pytest.raises(ConfigError, match="k=5 experts per token, but there are 4 experts"):
        part.check(4)
