"""Stores give the parameters of experts as an engine computes with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, DecoderConfig
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.offload import HostStore, arrays_of

MOE = MoEConfig(every=2, num_experts=3, expert_dim=8, group_size=16)
SMALL = DecoderConfig(num_layers=4, width=4, num_heads=2, head_dim=2, mlp_dim=8, moe=MOE)


@pytest.fixture(scope="module")
def small():
    return Decoder(SMALL, 11, jax.random.key(0))


def test_a_host_store_has_the_parameters_of_every_layer_with_outputs_first(small):
    found = HostStore(arrays_of(small))
    assert found.experts == (3, 3)  # two of four layers have experts
    stacked = small.layers.parts[0][1].feed_forward.experts  # both layers in one array
    own = found.read((1, 2))
    np.testing.assert_array_equal(own["up"], stacked.up[...][1, 2].T)
    np.testing.assert_array_equal(own["down"], stacked.down[...][1, 2].T)
    assert found.nbytes((1, 2)) == 4 * sum(array.size for array in own.values())


def test_the_type_halves_the_bytes(small):
    found = HostStore(arrays_of(small, jnp.bfloat16))
    assert found.read((0, 0))["up"].dtype == jnp.bfloat16
    assert found.nbytes((0, 0)) == HostStore(arrays_of(small)).nbytes((0, 0)) // 2


def test_models_without_such_experts_are_rejected():
    for changes, message in [
        ({"every": 0}, "no experts to offload: upcycle it first"),
        ({"expert_dims": (4, 8, 12)}, r"layer 1 \(feed_forward\) has MixedExperts"),
    ]:
        config = dataclasses.replace(SMALL, moe=dataclasses.replace(MOE, **changes))
        shapes = nnx.eval_shape(lambda config=config: Decoder(config, 11, jax.random.key(0)))
        with pytest.raises(ConfigError, match=message):
            arrays_of(shapes)
