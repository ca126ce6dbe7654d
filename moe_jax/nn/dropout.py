"""Dropout as functions of an explicit key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def dropout(
    x: Float[Array, "*shape"], rate: float, key: PRNGKeyArray | None
) -> Float[Array, "*shape"]:
    """Returns ``x`` with entries zeroed with probability ``rate`` and the other entries rescaled.

    Without a key, ``x`` is returned unchanged.
    """
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def masked(
    x: Float[Array, "*shape"], rate: float, key: PRNGKeyArray | None, *, axes: int
) -> Float[Array, "*shape"]:
    """Returns ``x`` with vectors or tensors over its last ``axes`` axes zeroed at random.

    The masking of NLLB (2207.04672, section 4.2). Unlike dropout it scales at test time: without a
    key, ``x`` is multiplied by ``1 - rate``.

    Args:
        x: Array of any shape.
        rate: Probability that a vector or tensor is zeroed.
        key: Random key in training, or ``None``.
        axes: Number of trailing axes that are zeroed together.
    """
    if rate == 0.0:
        return x
    if key is None:
        return x * (1.0 - rate)
    shape = (*x.shape[: x.ndim - axes], *(1,) * axes)
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, shape), x, jnp.zeros_like(x))
