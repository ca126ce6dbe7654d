"""Dropout as functions of an explicit key."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes entries with probability ``rate`` and scales the rest; without a key, returns x."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def masked(x: jax.Array, rate: float, key: jax.Array | None, *, axes: int) -> jax.Array:
    """Zeroes whole trailing ``axes`` with probability ``rate``; without a key, scales by the rest.

    NLLB's masking (2207.04672, section 4.2): unlike dropout it scales at test time.
    """
    if rate == 0.0:
        return x
    if key is None:
        return x * (1.0 - rate)
    shape = (*x.shape[: x.ndim - axes], *(1,) * axes)
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, shape), x, jnp.zeros_like(x))
