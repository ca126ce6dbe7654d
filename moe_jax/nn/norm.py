"""Normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.init import constant


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a learned scale, computed in float32."""

    def __init__(self, width: int, eps: float):
        """Makes the scale ``(M,)``."""
        self.scale = constant(1.0, (width,), ("embed",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of ``x (..., M)``."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (wide * self.scale[...]).astype(x.dtype)
