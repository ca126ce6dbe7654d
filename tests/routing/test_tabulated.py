"""Routers that read the experts and gates of common tokens from a table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.routing.tabulated import EXPERTS, GATES, tabulated

# Of four ids, 0 and 2 are in the table; id 2 has chosen one expert alone.
TABLE = {
    EXPERTS: jnp.array([[2, 0], [-1, -1], [1, 0], [-1, -1]]),
    GATES: jnp.array([[0.75, 0.25], [0, 0], [1, 0], [0, 0]]),
}
LOGITS = jnp.tile(jnp.array([3.0, 2.0, 0.0]), (5, 1))
IDS = jnp.array([0, 1, 2, 3, 0])
VALID = jnp.array([True, True, True, False, False])


def planned(router, **given):
    """The combine weights ``(S, E)`` and the load of one group."""
    plan = jax.jit(functools.partial(router, capacity=4))(LOGITS, token_ids=IDS, **given)
    return np.asarray(plan.combine.sum(-1)), plan.counts.load.tolist()


def test_tokens_of_the_table_take_its_experts_and_gates():
    router = routing.preset("mixtral")
    before, _ = planned(router)
    after, load = planned(tabulated(router), state=TABLE, valid=VALID)
    np.testing.assert_allclose(after[0], [0.25, 0, 0.75])
    np.testing.assert_allclose(after[2], [0, 1, 0])
    # Another token is routed as before, and padding not at all, in the table or not.
    np.testing.assert_array_equal(after[1], before[1])
    assert not after[3:].any()
    # A choice of weight 0 takes no slot: three tokens have 2 + 2 + 1 choices.
    assert load == [2, 2, 1]


def test_routers_without_choices_of_tokens_are_refused():
    with pytest.raises(ConfigError, match="tokens that choose"):
        tabulated(routing.preset("expert_choice"))
