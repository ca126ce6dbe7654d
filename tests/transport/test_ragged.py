import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.errors import ConfigError
from moe_jax.routing.plan import Slots
from moe_jax.transport.ragged import Ragged, in_order_of_experts


def slots(expert, gate, experts):
    """Slots with the two fields that are read: choices `(G, S, K)` and gates, for `E` experts."""
    expert, gate = jnp.array(expert, jnp.int32), jnp.array(gate, jnp.float32)
    groups, size, _ = expert.shape
    empty = jnp.full((groups, experts, size), size, jnp.int32)
    return Slots(empty, jnp.zeros(empty.shape), jnp.zeros_like(expert), gate, expert, size)


def test_choices_are_sorted_by_expert_and_dropped_choices_are_last():
    # One group of 4 tokens, 2 experts. Token 1 goes to expert 0, in row 0; tokens 0 and 2 to
    # expert 1, in rows 1 and 2. Token 3 was dropped, so row 3 is empty and its place is past it.
    given = slots([[[1], [0], [1], [-1]]], [[[0.5], [0.6], [0.7], [0.0]]], 2)
    found, sizes = in_order_of_experts(given)
    assert sizes.tolist() == [1, 2]
    none = 4
    assert found.token.tolist() == [[[1, 0, 2, none]]]
    np.testing.assert_allclose(found.weight, [[[0.6, 0.5, 0.7, 0.0]]])
    assert found.place.tolist() == [[[1], [0], [2], [4]]]
    assert found.num_tokens == 4


def test_the_choices_of_all_groups_are_in_one_order():
    # Two groups of 2 tokens with 2 choices each. Tokens are numbered over groups: 0 to 3.
    expert = [[[0, 2], [2, 0]], [[1, 2], [-3, 0]]]
    found, sizes = in_order_of_experts(slots(expert, np.ones((2, 2, 2)), 3))
    assert sizes.tolist() == [3, 1, 3]
    assert found.token.tolist() == [[[0, 1, 3, 2, 0, 1, 2, 4]]]
    assert found.place.tolist() == [[[0, 4], [5, 1], [3, 6], [8, 2]]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 8]), st.sampled_from([1, 2]))
def test_every_choice_with_a_slot_is_in_one_row_of_its_expert(seed, experts, k):
    rng = np.random.default_rng(seed)
    expert = rng.choice(experts, (2, 12, k), p=rng.dirichlet(np.full(experts, 0.3)))
    expert = np.where(rng.random(expert.shape) < 0.2, -1 - expert, expert)
    gate = np.where(expert >= 0, rng.random(expert.shape), 0)
    found, sizes = jax.jit(in_order_of_experts)(slots(expert, gate, experts))
    owner = np.repeat(np.arange(experts), sizes)
    token, weight = np.asarray(found.token)[0, 0], np.asarray(found.weight)[0, 0]
    taken = []
    for s, (experts_of, gates, places) in enumerate(
        zip(expert.reshape(-1, k), gate.reshape(-1, k), np.asarray(found.place[0]), strict=True)
    ):
        for e, g, row in zip(experts_of, gates, places, strict=True):
            if e < 0:
                assert row == token.size
                continue
            assert (token[row], owner[row]) == (s, e)
            assert weight[row] == np.float32(g)
            taken.append(row)
    assert len(set(taken)) == len(taken) == (token < 24).sum() == owner.size


def test_experts_that_choose_are_refused():
    table = jnp.zeros((1, 2, 3), jnp.int32)
    with pytest.raises(ConfigError, match="transport='ragged' requires tokens that choose"):
        in_order_of_experts(Slots(table, jnp.zeros(table.shape), None, None, None, 3))


def test_experts_without_the_function_are_named():
    # The experts are rejected before the plan is read.
    with pytest.raises(ConfigError, match="requires experts with the function on_choices.*partial"):
        Ragged()(functools.partial(jnp.multiply, 2), jnp.ones((1, 4, 3)), None)
