"""Linear maps between tokens and attention heads."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.parallel.rules import platform


def to_heads(x: Float[Array, "B L M"], weight: Float[Array, "M H D"]) -> Float[Array, "B H L D"]:
    """Returns the features of every head, a linear map of the tokens.

    On a CPU the product is one of matrices, because XLA would transpose the weights in every call
    of the other form. An accelerator has its own order of the weights in memory, and XLA chooses
    the form there.

    Args:
        x: Tokens ``(B, L, M)``.
        weight: Weights ``(M, H, D)`` of the map.
    """
    if platform() != "cpu":
        return jnp.einsum("blm,mhd->bhld", x, weight)
    inputs, heads, features = weight.shape
    y = x @ weight.reshape(inputs, heads * features)
    return y.reshape(*x.shape[:-1], heads, features).swapaxes(1, 2)


def from_heads(x: Float[Array, "B H L D"], weight: Float[Array, "H D M"]) -> Float[Array, "B L M"]:
    """Returns a linear map of the features of all heads, one vector per token.

    Args:
        x: Features ``(B, H, L, D)``.
        weight: Weights ``(H, D, M)`` of the map.
    """
    if platform() != "cpu":
        return jnp.einsum("bhld,hdm->blm", x, weight)
    heads, features, outputs = weight.shape
    y = x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], heads * features)
    return y @ weight.reshape(heads * features, outputs)
