"""The heads of MoE++ and ZAYA1, which read values of the MoE layer before."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.nn.router import RouterLayer
from moe_jax.routing import Linear, NormedMLP, ResidualLinear, ResidualMLP, preset
from tests.routing.helpers import normal
from tests.routing.test_head import arrays


def test_the_logits_before_are_mapped_and_added():
    # (1, 2) on the kernel gives (1, 4); the logits (10, 20) before give (20, 30) by the residual
    # map: each column sums its rows times 10 and 20.
    given = arrays(kernel=[[1, 0], [0, 2]], residual=[[0, 1], [1, 1]])
    x, before = np.array([[1, 2]], np.float32), np.array([[10, 20]], np.float32)
    logits, carried = ResidualLinear().read(x, given, 2, before)
    np.testing.assert_array_equal(logits, [[21, 34]])
    # The next layer reads the sum, not the product of this layer alone.
    np.testing.assert_array_equal(carried, logits)
    for first, _ in (
        ResidualLinear().read(x, given, 2, None),
        ResidualLinear().read(x, given, 2, 0 * before),
    ):
        np.testing.assert_array_equal(first, [[1, 4]])
    np.testing.assert_array_equal(ResidualLinear().logits(x, given, 2), [[1, 4]])


def test_the_sum_before_is_scaled_and_added_before_the_norm():
    # The bias of the projection takes the place of what the layer before adds.
    shapes = ResidualMLP(dim=3).parameters(4, 2, 1)
    given = {
        name: jnp.asarray(normal(i, *one.shape)) for i, (name, one) in enumerate(shapes.items())
    }
    x, before = jnp.asarray(normal(20, 1, 4)), jnp.asarray(normal(21, 1, 3))
    logits, carried = ResidualMLP(dim=3).read(x, given, 2, before)
    moved = given["down_bias"] + before[0] * given["carried_scale"]
    wanted = NormedMLP(dim=3).logits(x, given | {"down_bias": moved}, 2)
    np.testing.assert_allclose(logits, wanted, rtol=1e-5)
    np.testing.assert_allclose(carried, x @ given["down"] + moved, rtol=1e-5)
    plain = NormedMLP(dim=3).logits(x, given, 2)
    np.testing.assert_array_equal(ResidualMLP(dim=3).logits(x, given, 2), plain)
    np.testing.assert_array_equal(ResidualMLP(dim=3).read(x, given, 2, 0 * before)[0], plain)
    assert np.abs(logits - plain).max() > 1e-2


def test_what_passes_on_has_the_width_of_experts_or_of_the_network():
    assert preset("moe_plus_plus", constant=2, copy=1, zero=1).carried_width(8) == 12
    assert preset("zaya", dim=6).carried_width(8) == 6
    assert preset("mixtral").carried_width(8) == 0
    assert Linear().read(jnp.ones((1, 2)), arrays(kernel=[[1], [1]]), 1, None)[1] is None


@pytest.mark.parametrize("name", ["moe_plus_plus", "zaya"])
def test_a_first_layer_starts_with_zeros_in_float32(name: str):
    layer = RouterLayer(preset(name), 4, 3, jax.random.key(0), 1.0)
    x = jnp.ones((1, 2, 4), jnp.bfloat16)
    valid = jnp.ones((1, 2), bool)

    def run(layer):
        return layer(x, capacity=2, valid=valid, token_ids=None, record=None, rng=None)

    plan, carried = jax.eval_shape(run, layer)
    width = layer.router.carried_width(3)
    assert carried.shape == (1, 2, width) and carried.dtype == jnp.float32
    assert plan.free is not None
    zeros = jnp.zeros((1, 2, width))
    np.testing.assert_array_equal(layer.logits(x), layer.logits(x, zeros))


def test_a_router_with_two_planes_has_no_residual_logits():
    with pytest.raises(ConfigError, match="set its head to Linear"):
        ResidualLinear().parameters(4, 3, 2)
