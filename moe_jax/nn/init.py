"""Parameter initialisation and the one way a parameter is made."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.routing.head import Parameter


def weight(
    key: jax.Array,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    fan_in: int,
    scale: float,
) -> nnx.Param:
    """Returns a float32 parameter from a truncated normal (Switch section 2.4).

    Args:
        key: random key.
        shape: its shape.
        axes: the logical name of each axis, read by ``moe_jax.parallel``.
        fan_in: inputs per unit.
        scale: ``s`` in ``sigma = sqrt(s / fan_in)``; the draw is cut at two sigma.
    """
    sigma = math.sqrt(scale / fan_in)
    value = sigma * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
    return nnx.Param(value, axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """Returns a float32 parameter that starts as ``value`` everywhere: a norm or a bias.

    Weight decay leaves it alone, however many axes it has.
    """
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes, decayed=False)


def described(parameter: Parameter, key: jax.Array, scale: float) -> nnx.Param:
    """Returns the float32 parameter that a router's head describes."""
    shape, axes = parameter.shape, parameter.axes
    match parameter.init:
        case "fan_in":
            return weight(key, shape, axes, fan_in=int(parameter.size), scale=scale)
        case "normal":
            value = parameter.size * jax.random.normal(key, shape, jnp.float32)
        case "orthogonal":
            value = jax.nn.initializers.orthogonal(parameter.size)(key, shape, jnp.float32)
        case "zeros":
            value = jnp.zeros(shape, jnp.float32)
    return nnx.Param(value, axes=axes)
