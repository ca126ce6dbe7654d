"""The file of quantised weights: two int4 codes in a byte, and arrays as they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from moe_jax.errors import ConfigError
from moe_jax.quantised.codes import PRECISIONS, quantise
from moe_jax.quantised.packed import FILE, PackedFile, PackedLeaves, QuantisedArray, is_packed


def drawn(shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


def one(weights, precision):
    experts = tuple(range(weights.shape[0]))
    return QuantisedArray({precision: (experts, quantise(weights, precision))})


def mixed(weights):
    """Experts 0 and 2 in int4 and expert 1 in int8."""
    return QuantisedArray(
        {
            "int4": ((0, 2), quantise(weights[np.array([0, 2])], "int4")),
            "int8": ((1,), quantise(weights[1:2], "int8")),
        }
    )


def like(shape, dtype=jnp.float32, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def test_two_int4_codes_share_a_byte():
    # Codes 7, -3, 0 of a column of scale 2: the first byte holds 7 below and -3 (1101) above, and
    # the odd code has a byte of its own.
    found = one(jnp.asarray([[[15.0], [-6.0], [1.0]]]), "int4").tensors("up")
    assert found["up|int4|codes"].tolist() == [0b1101_0111, 0]


def test_the_size_on_disk_is_half_a_byte_per_int4_weight(tmp_path):
    sizes = {}
    for precision in ("int8", "int4"):
        weights = drawn((2, 64, 32))
        packed = PackedLeaves({"up": one(weights, precision)}, {"up": "up"})
        (tmp_path / precision).mkdir()
        packed.write(tmp_path / precision)
        sizes[precision] = (tmp_path / precision / FILE).stat().st_size
        tensors = load_file(tmp_path / precision / FILE)
        assert packed.size == sum(tensor.nbytes for tensor in tensors.values())
        assert tensors[f"up|{precision}|codes"].nbytes == weights.size * int(precision[3:]) // 8
    assert sizes["int8"] - sizes["int4"] == pytest.approx(2 * 64 * 32 // 2, abs=16)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_arrays_return_as_they_were(tmp_path, precision):
    weights = drawn((3, 5, 3))  # an odd number of codes
    array = one(weights, precision)
    PackedLeaves({"up": array}, {"params/up": "up"}).write(tmp_path)
    file = PackedFile(tmp_path)
    assert file.leaves == {"params/up"} and is_packed(tmp_path)
    found = file.fill({"params/up": like((3, 5, 3)), "other": like((1,))})
    assert found.keys() == {"params/up"}
    np.testing.assert_array_equal(found["params/up"], array.weights())


def test_a_stack_of_layers_of_several_precisions_is_sharded(tmp_path):
    first, second = mixed(drawn((3, 4, 2))), mixed(-drawn((3, 4, 2)))
    arrays, leaves = {"0": first, "1": second}, {"stack": ["0", "1"]}
    PackedLeaves(arrays, leaves).write(tmp_path)
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    spread = NamedSharding(mesh, PartitionSpec(None, None, None, "model"))
    found = PackedFile(tmp_path).fill({"stack": like((2, 3, 4, 2), jnp.bfloat16, spread)})["stack"]
    assert found.sharding == spread and found.dtype == jnp.bfloat16
    expected = np.stack([first.weights(), second.weights()])
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))
    assert PackedLeaves(arrays, leaves).summary()["0"] == {"int4": 2, "int8": 1}


def test_a_damaged_file_is_one_line(tmp_path):
    assert PackedFile(tmp_path).leaves == frozenset()
    PackedLeaves({"up": one(drawn((1, 2, 2)), "int8")}, {"up": "up"}).write(tmp_path)
    with pytest.raises(ConfigError, match=r"up is \(1, 2, 2\) in the file and \(1, 2, 3\)"):
        PackedFile(tmp_path).fill({"up": like((1, 2, 3))})
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-1])
    with pytest.raises(ConfigError, match="is damaged") as error:
        PackedFile(tmp_path)
    assert "\n" not in str(error.value)
