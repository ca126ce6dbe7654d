"""Quantiles from counts, by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from moe_jax.routing.select.histogram import counts_above, cut, quantile, widening_edges

EDGES = np.array([-1.0, 0.0, 1.0, 3.0], np.float32)


def test_counts_above():
    # One expert; the token 9 is padding, and 1 is at an edge.
    values, valid = jnp.array([[-2.0], [0.5], [1.0], [9.0]]), jnp.array([True, True, True, False])
    np.testing.assert_array_equal(counts_above(values, valid, EDGES), [[2, 2, 1, 0]])


def test_quantile_is_interpolated_between_edges():
    # 8 values: all from -1 on, 6 from 0, 2 from 1, none from 3.
    above = jnp.array([[8.0, 6.0, 2.0, 0.0]])
    expected = {8.0: -1.0, 7.0: -0.5, 6.0: 0.0, 4.0: 0.5, 2.0: 1.0, 1.0: 2.0, 0.0: 3.0}
    for number, value in expected.items():
        np.testing.assert_allclose(quantile(above, jnp.array([number]), EDGES), [value])


def test_a_quantile_beyond_the_edges_is_the_edge():
    # No edge has nine values above; values beyond the last edge are counted at it.
    above = jnp.array([[8.0, 6.0, 2.0, 1.0]])
    np.testing.assert_allclose(quantile(above, jnp.array([9.0]), EDGES), [-1.0])
    np.testing.assert_allclose(quantile(above, jnp.array([0.5]), EDGES), [3.0])


def test_layers_have_quantiles_of_their_own():
    above = jnp.array([[[8.0, 6.0, 2.0, 0.0]], [[8.0, 8.0, 8.0, 0.0]]])
    np.testing.assert_allclose(quantile(above, jnp.array([[4.0], [4.0]]), EDGES), [[0.5], [2.0]])


def test_a_step_without_tokens_cuts_at_zero():
    # Of two layers, the second has seen no token.
    above = jnp.array([[[8.0, 6.0, 2.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]]])
    tokens = jnp.array([8.0, 0.0])
    found = cut(above, jnp.array([[4.0], [0.0]]), tokens, EDGES)
    np.testing.assert_allclose(found, [[0.5], [0.0]])


def test_edges_are_dense_around_zero_and_reach_four():
    edges = widening_edges(128)
    np.testing.assert_allclose(edges[[0, -1]], [-4, 4], rtol=1e-6)
    np.testing.assert_allclose(edges, -edges[::-1], atol=1e-7)
    width = np.diff(edges)
    assert width.min() < 2e-5
    # Far from 0 a bin is a sixth of its distance.
    assert (width[80:] / edges[80:-1] < 0.2).all()
