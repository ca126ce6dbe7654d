"""Codes and scales of hand-sized weights, the bound of the error, and factors of channels."""

import importlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.errors import ConfigError
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.quantised.codes import (
    PRECISIONS,
    check_precision,
    factors_of,
    quantise,
    size_of_expert,
)


def drawn(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def test_int4_codes_are_those_by_hand():
    # The range of int4 codes is 7.5 to both sides, so the columns with largest magnitudes 15 and 3
    # have scales 2 and 0.4. Halves round to the even code, and 7.5 saturates at 7.
    weights = jnp.asarray([[[15.0, 1.0], [-6.0, -3.0], [1.0, 0.1]]])
    found = quantise(weights, "int4")
    np.testing.assert_allclose(found.scales, [[[2, 0.4]]], rtol=1e-6)
    # 1 / 2 is 0.5, and 1 / 0.4 is 2.5: both round to even. -3 / 0.4 is -7.5, which rounds to -8.
    codes = np.asarray(found.values).astype(int)
    np.testing.assert_array_equal(codes[0, :, 0], [7, -3, 0])
    np.testing.assert_array_equal(codes[0, ::2, 1], [2, 0])
    assert codes[0, 1, 1] in (-8, -7)
    np.testing.assert_allclose(found.weights()[0, :, 0], [14, -6, 0], rtol=1e-6)


def test_groups_of_input_channels_have_their_own_scales():
    # Two groups of two rows: largest magnitudes 127.5 and 1.275 give scales 1 and 0.01.
    weights = jnp.asarray([[[127.5], [-20.2], [1.275], [0.304]]])
    found = quantise(weights, "int8", group=2)
    np.testing.assert_allclose(found.scales, [[[1.0], [0.01]]], rtol=1e-6)
    np.testing.assert_array_equal(found.values[0, :, 0], [127, -20, 127, 30])
    np.testing.assert_allclose(found.weights()[0, :, 0], [127, -20, 1.27, 0.3], rtol=1e-6)


def test_fp8_codes_are_the_nearest_of_three_bits_of_mantissa():
    # The largest e4m3 number is 448, so the scale is 1. 17 lies between 16 and 18, at the even 16;
    # 25.5 lies between 24 and 26.
    weights = jnp.asarray([[[448.0], [17.0], [-25.5], [0.0]]])
    found = quantise(weights, "fp8")
    assert found.values.dtype == jnp.float8_e4m3fn and float(found.scales[0, 0, 0]) == 1
    np.testing.assert_array_equal(found.weights()[0, :, 0], [448, 16, -26, 0])


def test_factors_make_the_codes_of_their_channels_finer():
    # Weights divided by the factors are 15 and 8, whose scale is 2; codes 7 and 4 stand for 14 and
    # 8 before the factors.
    weights, factors = jnp.asarray([[[15.0], [1.0]]]), jnp.asarray([[1.0, 0.125]])
    found = quantise(weights, "int4", factors=factors)
    np.testing.assert_array_equal(np.asarray(found.values).astype(int)[0, :, 0], [7, 4])
    np.testing.assert_allclose(found.weights()[0, :, 0], [14, 1])


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
    precision=st.sampled_from(["int8", "int4"]),
    group=st.sampled_from([0, 2]),
    magnitude=st.floats(-6, 6),
    seed=st.integers(0, 2**16),
)
def test_the_error_is_at_most_half_a_scale(precision, group, magnitude, seed):
    weights = drawn((2, 4, 3), seed) * 10**magnitude
    found = quantise(weights, precision, group)
    scales = np.repeat(np.asarray(found.scales), 4 // found.scales.shape[1], axis=1)
    rounding = np.abs(weights) * 2**-22  # of float32, in the division and in the product
    assert (np.abs(np.asarray(weights) - found.weights()) <= scales / 2 + rounding).all()


def test_the_error_of_fp8_is_at_most_a_sixteenth():
    weights = drawn((2, 64, 3))
    found = quantise(weights, "fp8")
    # Half a unit of the last of three bits of mantissa; below 2**-6 the unit is 2**-9.
    bound = np.maximum(np.abs(weights) / 16, np.asarray(found.scales) * 2**-10)
    assert (np.abs(np.asarray(weights) - found.weights()) <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zeros_stay_zeros(precision):
    assert not quantise(jnp.zeros((1, 2, 2)), precision).weights().any()


def test_factors_of_the_activity_lower_the_error_of_the_outputs():
    # One input channel in eight is a hundred times as active, and its weights are small, so the
    # plain codes round them away.
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((2, 16, 8)).astype(np.float32)
    weights[:, ::8] *= 0.05
    tokens = rng.standard_normal((2, 64, 16)).astype(np.float32)
    tokens[..., ::8] *= 100
    activity = jnp.asarray(np.abs(tokens).mean(1))

    def error(found):
        return np.square(tokens @ weights - tokens @ found.weights()).sum((1, 2))

    array = jnp.asarray(weights)
    factors = factors_of(array, activity, "int4")
    plain, aware = quantise(array, "int4"), quantise(array, "int4", factors=factors)
    assert (error(aware) < error(plain) / 4).all()


def test_an_expert_without_tokens_has_factors_of_one():
    found = factors_of(drawn((2, 4, 3)), jnp.asarray([[0.0] * 4, [1.0, 9, 1, 1]]), "int4", 2)
    np.testing.assert_allclose(found[0], 1, rtol=1e-6)


def test_codes_do_not_depend_on_the_sharding_of_experts():
    weights, activity = drawn((8, 8, 4)), jnp.abs(drawn((8, 8), 1))
    spread = NamedSharding(make_mesh(MeshConfig(expert=8)), PartitionSpec("expert"))
    there, seen = jax.device_put((weights, activity), spread)
    for precision in PRECISIONS:
        one = quantise(weights, precision, 4, factors_of(weights, activity, precision, 4))
        other = quantise(there, precision, 4, factors_of(there, seen, precision, 4))
        np.testing.assert_array_equal(one.values, other.values)
        np.testing.assert_array_equal(one.scales, other.scales)
    assert len(quantise(there, "int8").values.sharding.device_set) == 8


def test_the_size_of_an_expert_counts_codes_scales_and_its_index():
    # 15 codes of four bits are 7.5 bytes; 5 scales, 3 factors and an index have four bytes each.
    assert size_of_expert((3, 5), "int4", factors=True) == 8 + 4 * (5 + 3 + 1)
    assert size_of_expert((4, 2), "int8", 2) == 8 + 4 * (2 * 2 + 1)


def test_an_unknown_precision_and_a_missing_library_are_one_line(monkeypatch):
    with pytest.raises(ConfigError, match="bits='int3' is none of int8, int4, fp8"):
        check_precision("int3")

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="needs qwix: pip install"):
        check_precision("int8")
