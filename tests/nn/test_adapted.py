"""A weight with an adapter: the sum that layers read, by hand."""

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax.nn.adapted import Adapted, LoRA
from moe_jax.nn.projection import is_projection


def adapted(shape, axes, lora, keys=None, values=None):
    """A weight of zeros, with drawn adapters or with these values of ``A`` and ``B``."""
    base = nnx.Param(np.zeros(shape, np.float32), axes=axes)
    made = Adapted(base, lora, jax.random.key(0) if keys is None else keys)
    for name, value in zip(("lora_a", "lora_b"), values or (), strict=False):
        parameter = getattr(made, name)
        assert parameter[...].shape == np.shape(value)
        parameter.set_value(jax.numpy.asarray(value, np.float32))
    return made


def test_the_sum_by_hand():
    # alpha / rank = 2, and A B = [1, 2]^T [10, 20] = [[10, 20], [20, 40]].
    weight = adapted((2, 2), ("embed", "mlp"), LoRA(1, 2.0), values=([[1], [2]], [[10, 20]]))
    weight.base.set_value(jax.numpy.asarray([[1.0, 2.0], [3.0, 4.0]]))
    np.testing.assert_array_equal(weight[...], [[21, 42], [43, 84]])
    np.testing.assert_array_equal(weight[0], [21, 42])
    np.testing.assert_array_equal(weight.merged()[...], weight[...])


def test_each_expert_has_its_own_pair():
    # Expert 0: [1]^T [3, 4]. Expert 1: [2]^T [5, 6].
    axes = ("expert", "expert_embed", "expert_mlp")
    values = [[[1]], [[2]]], [[[3, 4]], [[5, 6]]]
    weight = adapted((2, 1, 2), axes, LoRA(1, 1.0), values=values)
    np.testing.assert_array_equal(weight[...], [[[3, 4]], [[10, 12]]])
    assert weight.lora_a.get_metadata()["axes"] == ("expert", "expert_embed", None)
    assert weight.lora_b.get_metadata()["axes"] == ("expert", None, "expert_mlp")


def test_heads_are_outputs_of_queries_and_inputs_of_the_output():
    query = adapted((3, 2, 4), ("embed", "heads", "head"), LoRA(5))
    assert (query.lora_a[...].shape, query.lora_b[...].shape) == ((3, 5), (5, 2, 4))
    output = adapted((2, 4, 3), ("heads", "head", "embed"), LoRA(5))
    assert (output.lora_a[...].shape, output.lora_b[...].shape) == ((2, 4, 5), (5, 3))
    b = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    output.lora_b.set_value(jax.numpy.asarray(b))
    expected = 16 / 5 * np.tensordot(np.asarray(output.lora_a[...]), b, 1)
    np.testing.assert_allclose(output[...], expected, rtol=1e-5, atol=1e-6)


def test_stacked_layers_have_the_pairs_of_single_layers():
    keys = jax.random.split(jax.random.key(1), 3)
    stacked = adapted((3, 4, 2), ("embed", "mlp"), LoRA(2), keys)
    assert stacked.lora_b[...].shape == (3, 2, 2) and not np.any(stacked.lora_b[...])
    for layer, key in enumerate(keys):
        alone = adapted((4, 2), ("embed", "mlp"), LoRA(2), key)
        np.testing.assert_array_equal(stacked.lora_a[...][layer], alone.lora_a[...])


@pytest.mark.parametrize(
    ("axes", "metadata", "found"),
    [
        (("embed", "mlp"), {}, True),
        (("expert", "expert_embed", "expert_mlp"), {}, True),
        (("embed", "router"), {}, True),
        (("embed", "router", "router"), {}, True),
        (("vocab", "embed"), {}, False),
        (("embed",), {}, False),
        (("expert", "expert_mlp"), {}, False),
        (("heads", "head"), {"decayed": False}, False),  # a bias
        ((None, "heads"), {}, False),  # a table of distances
    ],
)
def test_projections_have_adapters(axes, metadata, found):
    param = nnx.Param(np.zeros((1,) * len(axes)), axes=axes, **metadata)
    assert is_projection(param, "router") == found
