"""The counts of a plan by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.routing import presets
from moe_jax.routing.plan import Counts


def test_dropped_choices_are_those_that_found_their_expert_full():
    # Of 5 wishes for expert 0 two get a slot, of 2 for expert 1 one: 3 + 1 are dropped.
    counts = Counts(jnp.array([5.0, 2.0]), jnp.array([2.0, 1.0]), jnp.array(0.0), jnp.array(7.0))
    np.testing.assert_array_equal(counts.overflow, [3, 1])
    assert counts.dropped == 4


def test_the_number_of_tokens_of_slots_is_a_shape_in_compiled_functions():
    slots = presets.switch()(jnp.ones((3, 2))).slots
    assert jax.jit(lambda slots: jnp.zeros(slots.num_tokens))(slots).shape == (3,)


def test_a_removed_choice_is_a_dropped_choice():
    # Three tokens take both of two experts, in slots 0, 1, 2 of each: the second token leaves
    # expert 1, so slot 1 of expert 1 is empty and its choice has no place; nothing else changes.
    logits = jnp.array([[1.0, 0.0], [2.0, 1.0], [0.0, 1.0]])
    slots = presets.mixtral()(logits, capacity=3).slots
    removed = jnp.zeros((3, 2), bool).at[1, 1].set(True)
    found = slots.without(removed)
    assert not found.dispatch[1, 1].any() and not found.combine[1, 1].any()
    np.testing.assert_array_equal(
        found.token == 3, (slots.token == 3) | (slots.token == 1) & np.array([[False], [True]])
    )
    np.testing.assert_array_equal(found.expert[1], [0, -2])
    np.testing.assert_array_equal(found.place[1], [slots.place[1, 0], 2 * 3])
    np.testing.assert_array_equal(found.gate, slots.gate.at[1, 1].set(0))
    others = np.array([0, 2])
    np.testing.assert_array_equal(found.combine[others], slots.combine[others])
