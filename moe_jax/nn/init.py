"""Parameters and their initialisation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from moe_jax.routing.head import Parameter


def weight(
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    fan_in: int,
    scale: float,
) -> nnx.Param:
    """Returns a float32 parameter drawn from a truncated normal (Switch, 2101.03961, section 2.4).

    Args:
        key: Random key.
        shape: Shape of the parameter.
        axes: Logical name of each axis, which ``moe_jax.parallel`` maps to axes of the mesh.
        fan_in: Number of inputs per unit.
        scale: ``s`` in ``sigma = sqrt(s / fan_in)``; the normal is truncated at two sigma.
    """
    sigma = math.sqrt(scale / fan_in)
    value = sigma * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
    return nnx.Param(value, axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """Returns a float32 parameter whose entries all start as ``value``, for a norm or a bias.

    Weight decay skips the parameter, however many axes it has.
    """
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes, decayed=False)


def described(parameter: Parameter, key: PRNGKeyArray, scale: float) -> nnx.Param:
    """Returns the float32 parameter that the head of a router describes.

    Args:
        parameter: Shape, axes and initialisation.
        key: Random key.
        scale: See ``weight``; other initialisations have no scale.
    """
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
        case "ones":
            return constant(1.0, shape, axes)
    return nnx.Param(value, axes=axes)
