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
