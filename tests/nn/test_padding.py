import jax.numpy as jnp

from moe_jax.nn.padding import valid_tokens


def test_segment_zero_is_padding():
    assert valid_tokens(jnp.array([[1, 2, 0]])).tolist() == [[True, True, False]]
