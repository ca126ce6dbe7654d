"""Factors of the routed and the shared output of an MoE layer, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.shared import Shared, SharedConfig
from moe_jax.surgery.factors import factors

X = np.float32([[[1, 2], [-2, 0]]])


@pytest.mark.parametrize("mix", ["sum", "sigmoid", "softmax", "conditional"])
def test_factors_are_the_gates_of_the_mixture(mix):
    shared = Shared(SharedConfig(3, mix=mix), FeedForwardConfig(2, 3), jax.random.key(0))
    columns = {"sum": 0, "sigmoid": 1, "softmax": 2, "conditional": 1}[mix]
    if columns:  # The logits of the two tokens are the logarithms of 3 and of 1/9.
        kernel = np.float32([[np.log(3)], [0]]) * np.eye(1, columns, dtype=np.float32)
        shared.gate[...] = jnp.asarray(kernel)
    expected = {
        "sum": [[1, 1], [1, 1]],
        "sigmoid": [[1, 3 / 4], [1, 1 / 10]],
        "softmax": [[3 / 4, 1 / 4], [1 / 10, 9 / 10]],
        "conditional": [[3 / 4, 1 / 4], [1 / 10, 9 / 10]],
    }[mix]
    np.testing.assert_allclose(factors(shared, X, 5 * X, None)[0], expected, rtol=1e-5)
    # A layer without norms multiplies its outputs by the factors.
    valid = jnp.ones((1, 2), bool)
    y, _ = shared(X, 5 * X, valid, None)
    parts = (
        jnp.stack([5 * X, shared.network(X)], -1) * factors(shared, X, 5 * X, None)[..., None, :]
    )
    np.testing.assert_allclose(y, parts.sum(-1), rtol=1e-5, atol=1e-6)


def test_norms_divide_by_the_root_mean_square_of_each_output():
    config = SharedConfig(3, norms=True)
    shared = Shared(config, FeedForwardConfig(2, 3, "relu"), jax.random.key(0))
    # The norm of the inputs makes (7, 7) and (-2, 2) of sizes 1; three units pass the first on.
    shared.network.up[...] = jnp.float32([[1, 1, 1], [0, 0, 0]])
    shared.network.down[...] = jnp.float32([[1, 1], [1, 1], [2, 2]])
    residual = np.float32([[[7, 7], [2, -2]]])
    routed = np.float32([[[3, -3], [1, 7]]])  # root mean squares of 3 and 5
    found = factors(shared, X, routed, residual)[0]
    np.testing.assert_allclose(found, [[1 / 3, 1 / 4], [1 / 5, 1 / 4]], rtol=1e-4)
    # Without a norm of the layer, the shared network reads its input: 1 / sqrt(2.5) of 4.
    alone = factors(shared, X, routed, None)[0]
    np.testing.assert_allclose(alone[0, 1], np.sqrt(2.5) / 4, rtol=1e-4)
