"""Codes of experts, and the weights that programs compute from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.offload import quantised_expert, weights_of
from moe_jax.quantised.codes import PRECISIONS, quantise


def drawn(shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("group", [0, 2])
def test_the_weights_are_those_of_the_codes_to_the_bit(precision, group):
    own = {"up": drawn((3, 8)), "down": drawn((8, 4)), "up_bias": drawn(3)}
    held = quantised_expert(own, precision, group)
    found = jax.jit(lambda held: weights_of(held, jnp.float32))(held)
    assert found.keys() == own.keys()
    for name in ("up", "down"):
        expected = quantise(jnp.asarray(own[name]).T[None], precision, group).weights()[0].T
        np.testing.assert_array_equal(found[name], expected)
    np.testing.assert_array_equal(found["up_bias"], own["up_bias"])


def test_two_int4_codes_share_a_byte():
    # Scales are 15 / 7.5 = 2, so the codes are 7, -3: 7 is below, and -3 (1101) above.
    held = quantised_expert({"up": np.array([[15.0, -6.0]], np.float32)}, "int4")
    assert held["up_int4"].tolist() == [[0b1101_0111]]
    assert held["up_scales"].shape == (1, 1)


def test_weights_of_an_expert_that_is_not_quantised():
    own = {"up": drawn((3, 2)), "up_bias": drawn(3)}
    found = weights_of(jax.device_put(own), jnp.bfloat16)
    assert {name: array.dtype for name, array in found.items()} == dict.fromkeys(own, jnp.bfloat16)
    np.testing.assert_array_equal(found["up"], own["up"].astype(jnp.bfloat16))


def test_unfit_groups_and_odd_inputs_are_rejected():
    with pytest.raises(ConfigError, match="group=3 does not divide the 8 inputs of up"):
        quantised_expert({"up": drawn((2, 8))}, "int8", 3)
    with pytest.raises(ConfigError, match="up has 3 inputs, and int4 needs an even number"):
        quantised_expert({"up": drawn((2, 3))}, "int4")
