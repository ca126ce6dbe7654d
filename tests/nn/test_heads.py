"""Maps between tokens and heads equal their definitions, and read weights where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.nn.heads import from_heads, to_heads

RNG = np.random.default_rng(0)


def drawn(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("batch", "length"), [(2, 3), (1, 1), (4, 1)])
def test_maps_equal_their_definitions(batch, length):
    x, to, back = drawn(batch, length, 8), drawn(8, 2, 4), drawn(2, 4, 8)
    heads = to_heads(x, to)
    expected = np.einsum("blm,mhd->bhld", x, to)
    np.testing.assert_allclose(heads, expected, rtol=1e-5, atol=1e-5)
    expected = np.einsum("bhld,hdm->blm", heads, back)
    np.testing.assert_allclose(from_heads(heads, back), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 16])
def test_a_cpu_reads_weights_where_they_are(batch):
    """The program has no array of the weights' size beside the weights."""

    def mapped(x, to, back):
        return from_heads(jnp.tanh(to_heads(x, to)), back)

    arguments = drawn(batch, 1, 128), drawn(128, 4, 32), drawn(4, 32, 128)
    program = jax.jit(mapped).lower(*arguments).compile()
    assert program.memory_analysis().temp_size_in_bytes < 128 * 128 * 4
