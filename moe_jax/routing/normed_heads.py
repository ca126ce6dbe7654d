"""Heads that normalise the token first: those of Gemma 4 and ZAYA1."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.precision import wide_einsum
from moe_jax.ranges import Epsilon, Positive
from moe_jax.routing.head import Head, Parameter


@dataclasses.dataclass(frozen=True)
class NormedLinear(Head):
    """A linear map of the token with unit mean square and a learned scale per feature (Gemma 4).

    The features are also divided by the square root of the width. A router with two planes has a
    learned scale per expert in the second (``per_expert_scale``), which is equal for all tokens.

    Attributes:
        epsilon: Added to the mean square.
    """

    epsilon: Epsilon = 1e-6

    def parameters(self, width: int, experts: int, planes: int) -> dict[str, Parameter]:
        """Returns ``scale (M,)``, ``kernel (M, E)`` and, for two planes, ``expert_scale (E,)``."""
        parameters = {
            "scale": Parameter((width,), ("embed",), "ones"),
            "kernel": Parameter((width, experts), ("embed", "router"), "fan_in", float(width)),
        }
        if planes > 1:
            parameters["expert_scale"] = Parameter((experts,), ("router",), "ones")
        return parameters

    def logits(
        self, x: Float[Array, "*B M"], parameters: Mapping[str, Array], experts: int
    ) -> Float[Array, "*B E"] | Float[Array, "*B E P"]:
        """Returns the logits, and the scales of the experts as the second plane."""
        del experts
        features = normed(x, self.epsilon) * parameters["scale"] * x.shape[-1] ** -0.5
        kernel = parameters["kernel"].astype(x.dtype)
        logits = wide_einsum("...m,me->...e", features.astype(x.dtype), kernel)
        if "expert_scale" not in parameters:
            return logits
        scale = jnp.broadcast_to(parameters["expert_scale"].astype(logits.dtype), logits.shape)
        return jnp.stack([logits, scale], axis=-1)


@dataclasses.dataclass(frozen=True)
class NormedMLP(Head):
    """A projection of the token, a norm, two hidden layers with GELU, and the logits (ZAYA1).

    ``ResidualMLP`` also reads the projection of the MoE layer before.

    Attributes:
        dim: Width ``D`` of the projection and of the hidden layers.
        epsilon: Added to the mean square in the norm.
    """

    dim: Positive = 256
    epsilon: Epsilon = 1e-5

    def parameters(self, width: int, experts: int, planes: int) -> dict[str, Parameter]:
        """Returns the kernels and biases of ``down``, ``first`` and ``second``, and ``kernel``."""
        del planes
        bias = Parameter((self.dim,), ("router",), "zeros")
        hidden = Parameter((self.dim, self.dim), ("router", "router"), "fan_in", float(self.dim))
        return {
            "down": Parameter((width, self.dim), ("embed", "router"), "fan_in", float(width)),
            "down_bias": bias,
            "scale": Parameter((self.dim,), ("router",), "ones"),
            "first": hidden,
            "first_bias": bias,
            "second": hidden,
            "second_bias": bias,
            "kernel": Parameter(
                (self.dim, experts), ("router", "router"), "fan_in", float(self.dim)
            ),
        }

    def logits(
        self, x: Float[Array, "*B M"], parameters: Mapping[str, Array], experts: int
    ) -> Float[Array, "*B E"]:
        """Returns the logits of the last hidden layer."""
        del experts
        return self.logits_of(self.projected(x, parameters), parameters, x.dtype)

    def projected(
        self, x: Float[Array, "*B M"], parameters: Mapping[str, Array]
    ) -> Float[Array, "*B D"]:
        """Returns the projection of the tokens, before the norm, in float32 or wider."""
        return _linear(x, parameters["down"]) + parameters["down_bias"]

    def logits_of(
        self, projected: Float[Array, "*B D"], parameters: Mapping[str, Array], dtype: jnp.dtype
    ) -> Float[Array, "*B E"]:
        """Returns the logits of projected tokens; the products have factors of type ``dtype``."""
        hidden = normed(projected, self.epsilon) * parameters["scale"]
        for name in ("first", "second"):
            hidden = _linear(hidden.astype(dtype), parameters[name]) + parameters[f"{name}_bias"]
            hidden = jax.nn.gelu(hidden, approximate=False)
        return _linear(hidden.astype(dtype), parameters["kernel"])


def _linear(x: Float[Array, "*B M"], kernel: Float[Array, "M D"]) -> Float[Array, "*B D"]:
    return wide_einsum("...m,md->...d", x, kernel.astype(x.dtype))


def normed(x: Float[Array, "*B M"], epsilon: float) -> Float[Array, "*B M"]:
    """Returns ``x`` divided by the root of its mean square, in float32 or wider."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon)
