"""Norm, dropout and initialisation."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.nn.dropout import dropout
from moe_jax.nn.init import constant, weight
from moe_jax.nn.norm import RMSNorm


def test_rms_norm_by_hand():
    # Mean square of (3, 4, 0, 0) is 25 / 4, its root 2.5: the vector becomes (1.2, 1.6, 0, 0).
    norm = RMSNorm(4, 0.0)
    np.testing.assert_allclose(norm(jnp.array([3.0, 4.0, 0.0, 0.0])), [1.2, 1.6, 0, 0], rtol=1e-6)
    norm.scale[...] = jnp.array([1.0, 2.0, 1.0, 1.0])
    np.testing.assert_allclose(norm(jnp.array([3.0, 4.0, 0.0, 0.0])), [1.2, 3.2, 0, 0], rtol=1e-6)


def test_rms_norm_is_computed_in_float32_and_finite_at_zero():
    # 300 squared overflows nothing in float32; in float16 it would.
    norm = RMSNorm(2, 1e-6)
    y = norm(jnp.array([300.0, -300.0], jnp.float16))
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y, [1.0, -1.0], rtol=1e-3)
    np.testing.assert_array_equal(norm(jnp.zeros(2)), 0.0)
    assert np.isfinite(jax.jacobian(norm)(jnp.zeros(2))).all()


def test_dropout_zeroes_a_share_and_rescales_the_rest():
    x = jnp.full((100, 100), 3.0)
    y = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(y)) == {0.0, 4.0}  # 3 / (1 - 0.25)
    assert abs((y == 0).mean() - 0.25) < 0.02


def test_dropout_without_key_or_rate_is_the_identity():
    x = jnp.ones((2, 2))
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_weights_are_normals_cut_at_two_sigma():
    # sigma = sqrt(0.1 / 40) = 0.05. A standard normal cut at 2 has deviation 0.8796.
    made = weight(jax.random.key(0), (40, 500), ("embed", "mlp"), fan_in=40, scale=0.1)
    value = np.asarray(made[...])
    assert value.dtype == np.float32 and made.get_metadata()["axes"] == ("embed", "mlp")
    assert 0.099 < np.abs(value).max() <= 0.1
    np.testing.assert_allclose(value.std(), 0.05 * 0.8796, rtol=0.02)
    np.testing.assert_allclose(value.mean(), 0.0, atol=1e-3)


def test_constants():
    made = constant(1.0, (3,), ("embed",))
    np.testing.assert_array_equal(made[...], [1.0, 1.0, 1.0])
    assert made.get_metadata()["axes"] == ("embed",)
