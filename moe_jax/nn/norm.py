"""Normalisation."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe_jax.nn.init import constant
from moe_jax.ranges import Epsilon, Ranged


@dataclasses.dataclass(frozen=True)
class NormConfig(Ranged):
    """The norms of a model.

    Attributes:
        kind: Normalisation by the root mean square (``rms``, 1910.07467) or to mean 0 and variance
            1 (``layer``, 1607.06450).
        eps: Number added to the mean square before the root.
        bias: True adds a learned shift; only layer norms have one.
        place: Place of the norms of a residual branch: its ``input``, its ``output`` before the
            sum (OLMo 2), or ``both`` (Gemma 4).
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: Epsilon = 1e-6
    bias: bool = False
    place: Literal["input", "output", "both"] = "input"


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a learned scale, computed in float32."""

    def __init__(self, width: int, eps: float):
        """Initialises the scale ``(M,)`` to 1."""
        self.scale = constant(1.0, (width,), ("embed",))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rest M"]) -> Float[Array, "*rest M"]:
        """Returns ``x (..., M)``, normalised over its last axis."""
        return (unit_rms(x, self.eps) * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalisation to mean 0 and variance 1 with a learned scale, computed in float32."""

    def __init__(self, width: int, eps: float, *, bias: bool):
        """Initialises the scale ``(M,)`` to 1 and the bias ``(M,)``, if any, to 0."""
        self.scale = constant(1.0, (width,), ("embed",))
        self.bias = constant(0.0, (width,), ("embed",)) if bias else None
        self.eps = eps

    def __call__(self, x: Float[Array, "*rest M"]) -> Float[Array, "*rest M"]:
        """Returns ``x (..., M)``, normalised over its last axis."""
        wide = x.astype(jnp.float32)
        wide = unit_rms(wide - wide.mean(-1, keepdims=True), self.eps) * self.scale[...]
        return (wide if self.bias is None else wide + self.bias[...]).astype(x.dtype)


def norm(config: NormConfig, width: int) -> RMSNorm | LayerNorm:
    """Returns the norm of ``width`` features that ``config`` describes."""
    if config.kind == "rms":
        return RMSNorm(width, config.eps)
    return LayerNorm(width, config.eps, bias=config.bias)


def unit_rms(x: Float[Array, "*rest D"], eps: float) -> Float[Array, "*rest D"]:
    """Returns ``x (..., D)`` in float32, divided by its root mean square."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
