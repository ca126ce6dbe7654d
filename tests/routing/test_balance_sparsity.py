"""ReMoE's loss and its adaptive weight, by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.routing import Active, Relu, SparsityLoss
from tests.routing.helpers import inputs

# Token 0 has the gates 2 and 1, token 1 the gate 3, token 2 none; token 3 is padding.
LOGITS = np.array([[2.0, -1, 1], [3, -2, -1], [-1, -1, -1], [9, 9, 9]])
VALID = np.arange(4) < 3


def loss(steps: float, k: int = 1) -> float:
    given = inputs(LOGITS, VALID, sparsity_steps=np.full(1, steps))
    made = Relu()(given)
    return float(SparsityLoss(k=k, growth=2.0)(made, Active()(made, given), given))


def test_the_loss_weighs_scores_by_the_load():
    # Loads 2/3, 0 and 1/3 of the tokens; even is 1/3. Mean gates 5/3, 0 and 1/3.
    np.testing.assert_allclose(loss(0), 2 * 5 / 3 + 1 * 1 / 3, rtol=1e-6)
    # An even load of two experts per token is twice as large.
    np.testing.assert_allclose(loss(0, k=2), (2 * 5 / 3 + 1 / 3) / 2, rtol=1e-6)


def test_the_weight_doubles_and_halves():
    np.testing.assert_allclose([loss(3), loss(-1)], [8 * loss(0), loss(0) / 2], rtol=1e-6)


@pytest.mark.parametrize(("demand", "steps"), [([5, 4], 3.0), ([3, 2], 1.0), ([4, 4], 2.0)])
def test_the_weight_follows_the_number_of_experts_per_token(demand, steps: float):
    # Four tokens should have two experts each: eight choices.
    part, state = SparsityLoss(k=2), {"sparsity_steps": jnp.full(1, 2.0)}
    assert part.state_shapes(2) == {"sparsity_steps": (1,)}
    after = part.next_state(state, jnp.array(demand, jnp.float32), {"tokens": jnp.array(4.0)})
    np.testing.assert_array_equal(after["sparsity_steps"], [steps])


def test_layers_have_weights_of_their_own():
    state, tokens = {"sparsity_steps": jnp.zeros((2, 1))}, {"tokens": jnp.array([4.0, 4.0])}
    demand = jnp.array([[5.0, 4.0], [1.0, 1.0]])
    after = SparsityLoss(k=2).next_state(state, demand, tokens)
    np.testing.assert_array_equal(after["sparsity_steps"], [[1], [-1]])


def test_a_missing_state_is_named():
    given = inputs(LOGITS)
    made = Relu()(given)
    with pytest.raises(ConfigError, match="SparsityLoss needs state=.'sparsity_steps'"):
        SparsityLoss()(made, Active()(made, given), given)
