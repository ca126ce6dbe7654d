"""The counts of a plan by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from moe_jax.routing.plan import Counts


def test_dropped_choices_are_those_that_found_their_expert_full():
    # Of 5 wishes for expert 0 two get a slot, of 2 for expert 1 one: 3 + 1 are dropped.
    counts = Counts(jnp.array([5.0, 2.0]), jnp.array([2.0, 1.0]), jnp.array(0.0), jnp.array(7.0))
    np.testing.assert_array_equal(counts.overflow, [3, 1])
    assert counts.dropped == 4
