"""From tokens to router logits: the learned part of a router, as pure functions.

The layer makes the parameters that ``parameters`` describes and hands them back to ``logits``.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.precision import wide_einsum
from moe_jax.ranges import Positive, Ranged

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter to make.

    Attributes:
        shape: its shape.
        axes: its logical axes.
        init: ``fan_in`` is the truncated normal of all other layers, scaled by ``size`` inputs;
            ``normal`` has standard deviation ``size``; ``orthogonal`` has gain ``size``.
        size: of the initial values.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Literal["fan_in", "normal", "zeros", "orthogonal"]
    size: float = 0.0


class Head(Ranged, abc.ABC):
    """Tokens to logits. A subclass is a frozen dataclass.

    The products of a head are ``moe_jax.precision.wide_einsum``: plain products of float32 tensors
    are rounded to bfloat16 on a TPU, and some tokens then choose other experts.
    """

    @abc.abstractmethod
    def parameters(self, width: int, experts: int, planes: int) -> dict[str, Parameter]:
        """Returns what ``logits`` needs for tokens of ``width`` ``M``."""

    @abc.abstractmethod
    def logits(self, x: Array, parameters: Mapping[str, Array], experts: int) -> Array:
        """Returns ``(..., E)``, or ``(..., E, P)`` for more planes, for tokens ``(..., M)``.

        The tokens' type says what is multiplied, and the logits are float32 whatever it is.
        """


@dataclasses.dataclass(frozen=True)
class Linear(Head):
    """A linear map.

    Attributes:
        bias: add a learned bias (gpt-oss).
        init: ``scaled`` as all layers; ``normal`` with deviation 0.02 (flaxformer); ``zeros``
            (Shazeer 2017, appendix A).
    """

    bias: bool = False
    init: Literal["scaled", "normal", "zeros"] = "scaled"

    def parameters(self, width: int, experts: int, planes: int) -> dict[str, Parameter]:
        """Returns ``kernel (M, E)`` or ``(M, E, P)``, and ``bias (E,)``."""
        shape, axes = (width, experts), ("embed", "router")
        if planes > 1:
            shape, axes = (*shape, planes), (*axes, "router")
        init, size = {
            "scaled": ("fan_in", width),
            "normal": ("normal", 0.02),
            "zeros": ("zeros", 0.0),
        }[self.init]
        made = {"kernel": Parameter(shape, axes, init, size)}
        if self.bias:
            made["bias"] = Parameter(shape[1:], axes[1:], "zeros")
        return made

    def logits(self, x: Array, parameters: Mapping[str, Array], experts: int) -> Array:
        """Returns ``x kernel + bias``."""
        del experts
        kernel = parameters["kernel"].astype(x.dtype)
        product = "...m,me->...e" if kernel.ndim == 2 else "...m,mep->...ep"
        logits = wide_einsum(product, x, kernel)
        return logits + parameters["bias"].astype(logits.dtype) if self.bias else logits


@dataclasses.dataclass(frozen=True)
class Cosine(Head):
    """Low-dimensional token against unit expert embeddings (X-MoE, 2204.09179, section 3).

    Attributes:
        dim: of the embeddings.
        unit_tokens: divide the projected token by its norm too, as the paper's cosine does;
            torchscale's code divides the embeddings alone.
    """

    dim: Positive = 16
    unit_tokens: bool = False

    def parameters(self, width: int, experts: int, planes: int) -> dict[str, Parameter]:
        """Returns ``projection (M, D)`` and ``embedding (E, D)``."""
        del planes
        return {
            "projection": Parameter((width, self.dim), ("embed", "router"), "fan_in", width),
            "embedding": Parameter((experts, self.dim), ("router", "router"), "orthogonal", 0.32),
        }

    def logits(self, x: Array, parameters: Mapping[str, Array], experts: int) -> Array:
        """Returns the products of the token with every unit embedding."""
        del experts
        token = wide_einsum("...m,md->...d", x, parameters["projection"].astype(x.dtype))
        token = (_unit(token) if self.unit_tokens else token).astype(x.dtype)
        embedding = _unit(parameters["embedding"]).astype(x.dtype)
        return wide_einsum("...d,ed->...e", token, embedding)


@dataclasses.dataclass(frozen=True)
class UnitSlots(Head):
    """Unit tokens against learned unit slots with one learned scale (Soft MoE, 2308.00951)."""

    def parameters(self, width: int, experts: int, planes: int) -> dict[str, Parameter]:
        """Returns ``slots (M, E, P)`` and ``scale ()``, from 1."""
        axes = ("embed", "router", "router")
        return {
            "slots": Parameter((width, experts, planes), axes, "fan_in", width),
            "log_scale": Parameter((), (), "zeros"),
        }

    def logits(self, x: Array, parameters: Mapping[str, Array], experts: int) -> Array:
        """Returns ``(..., E, P)``."""
        del experts
        slots = parameters["slots"]
        slots = jnp.exp(parameters["log_scale"]) * _unit(slots, axis=0)
        return wide_einsum("...m,mep->...ep", _unit(x), slots.astype(x.dtype))


@dataclasses.dataclass(frozen=True)
class NoHead(Head):
    """No parameters and logits of zero, for routers that read no token."""

    def parameters(self, width: int, experts: int, planes: int) -> dict[str, Parameter]:
        """Returns nothing."""
        del width, experts, planes
        return {}

    def logits(self, x: Array, parameters: Mapping[str, Array], experts: int) -> Array:
        """Returns zeros."""
        del parameters
        return jnp.zeros((*x.shape[:-1], experts), jnp.float32)


def _unit(x: Array, axis: int = -1) -> Array:
    """Returns ``x`` over its norm, and zeros where it is zero, such as in padding."""
    # Over its largest entry first, so that no square is too small or too large for its type.
    largest = jax.lax.stop_gradient(jnp.abs(x).max(axis, keepdims=True))
    x = x / jnp.where(largest > 0, largest, 1)
    square = (x * x).sum(axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(largest > 0, square, 1))
