"""Normalisation."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.init import constant
from moe_jax.ranges import Epsilon, Ranged


@dataclasses.dataclass(frozen=True)
class NormConfig(Ranged):
    """The norms of a model.

    Attributes:
        kind: ``rms`` (1910.07467) or ``layer`` (1607.06450).
        eps: added to the mean square.
        bias: a learned shift; of layer norms alone.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: Epsilon = 1e-6
    bias: bool = False


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a learned scale, computed in float32."""

    def __init__(self, width: int, eps: float):
        """Makes the scale ``(M,)``."""
        self.scale = constant(1.0, (width,), ("embed",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of ``x (..., M)``."""
        return (unit_rms(x, self.eps) * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalisation to mean 0 and variance 1 with a learned scale, computed in float32."""

    def __init__(self, width: int, eps: float, *, bias: bool):
        """Makes the scale ``(M,)`` and the bias ``(M,)``."""
        self.scale = constant(1.0, (width,), ("embed",))
        self.bias = constant(0.0, (width,), ("embed",)) if bias else None
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of ``x (..., M)``."""
        wide = x.astype(jnp.float32)
        wide = unit_rms(wide - wide.mean(-1, keepdims=True), self.eps) * self.scale[...]
        return (wide if self.bias is None else wide + self.bias[...]).astype(x.dtype)


def norm(config: NormConfig, width: int) -> RMSNorm | LayerNorm:
    """Returns the norm of ``width`` features that ``config`` describes."""
    if config.kind == "rms":
        return RMSNorm(width, config.eps)
    return LayerNorm(width, config.eps, bias=config.bias)


def unit_rms(x: jax.Array, eps: float) -> jax.Array:
    """Returns ``x (..., D)`` in float32, divided by its root mean square."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
