"""Latent attention on a cache computes with latents, and gives what expanded heads give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.attend import View
from moe_jax.nn.latent import Latent, LatentAttention, LatentConfig

SIZES = Latent(query_rank=5, kv_rank=6, plain_dim=4, rotary_dim=2, value_dim=3, temperature=0.5)


@pytest.mark.parametrize(("queries", "absorbs"), [(1, True), (9, False)])
def test_the_cheaper_of_two_equal_ways_is_taken(queries, absorbs):
    # A head computes 2 * 6 + 2 products per query and key on latents, or 4 + 2 + 3 on its own keys
    # and values, which cost 6 * 7 products per key: 5 more per query are fewer up to 8 queries.
    layer = LatentAttention(LatentConfig(8, 3, SIZES), jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 12, 8))
    ones, places = jnp.ones((2, 12), jnp.int32), jnp.tile(jnp.arange(12), (2, 1))
    kv, whole = layer.project(x, places), layer(x, View(ones, places))
    start = 12 - queries
    last = View(ones[:, start:], places[:, start:], ones, places, start)
    np.testing.assert_allclose(layer(x[:, start:], last, kv), whole[:, start:], atol=1e-5)
    q = layer._queries(x[:, start:], places[:, start:])
    program = str(jax.make_jaxpr(lambda q: layer._mixed(q, kv, last))(q))
    assert ("f32[2,3,12,6]" in program) != absorbs  # Keys of 3 heads, plain and rotated features.
