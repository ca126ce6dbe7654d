import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.nn.feed_forward import Experts, FeedForward, FeedForwardConfig

ACTIVATIONS = {
    "relu": lambda z: np.maximum(z, 0),
    "relu2": lambda z: np.maximum(z, 0) ** 2,
    "gelu": lambda z: 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "silu": lambda z: z / (1 + np.exp(-z)),
}


def expected(layer, x: np.ndarray, activation: str, expert=...) -> np.ndarray:
    hidden = x @ np.asarray(layer.up[...][expert])
    if layer.config.gated:
        hidden = hidden * ACTIVATIONS[activation](x @ np.asarray(layer.gate[...][expert]))
    else:
        hidden = ACTIVATIONS[activation](hidden)
    return hidden @ np.asarray(layer.down[...][expert])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_dense_layer(activation, gated):
    layer = FeedForward(FeedForwardConfig(4, 6, activation, gated), jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected(layer, x, activation), atol=2e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_experts_are_separate_dense_layers(gated):
    experts = Experts(FeedForwardConfig(4, 6, "gelu", gated), 3, jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    y = experts(jnp.asarray(x))
    for e in range(3):
        np.testing.assert_allclose(y[e], expected(experts, x[e], "gelu", e), atol=2e-6)
    one, other = np.asarray(experts.up[...])[:2]
    assert not np.array_equal(one, other)


def test_an_empty_slot_stays_zero():
    # The transports rely on it: no bias, and activations that map 0 to 0.
    for activation in ACTIVATIONS:
        experts = Experts(FeedForwardConfig(4, 6, activation), 2, jax.random.key(0))
        np.testing.assert_array_equal(experts(jnp.zeros((2, 3, 4))), 0.0)


def test_only_a_gated_layer_has_a_gate():
    plain, gated = (
        FeedForward(FeedForwardConfig(4, 6, gated=gated), jax.random.key(0))
        for gated in (False, True)
    )
    assert not hasattr(plain, "gate") and gated.gate[...].shape == (4, 6)
    np.testing.assert_array_equal(plain.up[...], gated.up[...])


def test_activations_keep_their_type_and_parameters_theirs():
    layer = FeedForward(FeedForwardConfig(4, 6), jax.random.key(0))
    assert layer(jnp.ones((1, 1, 4), jnp.bfloat16)).dtype == jnp.bfloat16
    assert layer.up[...].dtype == jnp.float32
