"""Maps tokens to router logits: the learned part of a router, as pure functions.

The layer creates the parameters that ``parameters`` describes and passes them to ``logits``.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.precision import wide_einsum
from moe_jax.ranges import Positive, Ranged

Init = Literal["fan_in", "normal", "zeros", "ones", "orthogonal"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """The description of a parameter that the layer creates.

    Attributes:
        shape: Shape of the array.
        axes: Logical axis names, one per axis.
        init: Initialiser. ``fan_in`` is the truncated normal of all other layers, scaled by
            ``size`` inputs; ``normal`` has standard deviation ``size``; ``orthogonal`` has gain
            ``size``.
        size: Size of the initial values, as ``init`` defines it.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Init
    size: float = 0.0


class Head(Ranged, abc.ABC):
    """The map from tokens to logits. A subclass is a frozen dataclass.

    A head multiplies with ``moe_jax.precision.wide_einsum``: a TPU rounds plain products of float32
    tensors to bfloat16, and some tokens then choose other experts.
    """

    @abc.abstractmethod
    def parameters(self, width: int, experts: int, planes: int) -> dict[str, Parameter]:
        """Returns the parameters that ``logits`` needs, by name.

        Args:
            width: ``M``, the width of a token.
            experts: ``E``.
            planes: ``P``, the number of logits per token and expert.
        """

    @abc.abstractmethod
    def logits(
        self, x: Float[Array, "*B M"], parameters: Mapping[str, Array], experts: int
    ) -> Float[Array, "*B E"] | Float[Array, "*B E P"]:
        """Returns the logits ``(..., E)``, or ``(..., E, P)`` for several planes, in float32.

        The product is computed on factors of the tokens' type.

        Args:
            x: Tokens ``(..., M)``.
            parameters: The arrays that ``parameters`` describes.
            experts: ``E``.
        """

    def carried_width(self, experts: int) -> int:
        """Returns ``D``, the values per token that the router of the next MoE layer reads.

        Most heads pass nothing on, so ``D`` is 0.

        Args:
            experts: ``E``.
        """
        del experts
        return 0

    def read(
        self,
        x: Float[Array, "*B M"],
        parameters: Mapping[str, Array],
        experts: int,
        carried: Float[Array, "*B D"] | None,
    ) -> tuple[Float[Array, "*B E"] | Float[Array, "*B E P"], Float[Array, "*B D"] | None]:
        """Returns the logits as ``logits`` does, and the values for the next MoE layer.

        Args:
            x: Tokens ``(..., M)``.
            parameters: The arrays that ``parameters`` describes.
            experts: ``E``.
            carried: Values ``(..., D)`` of the MoE layer before, zeros in the first MoE layer;
                ``None`` stands for zeros.
        """
        del carried
        return self.logits(x, parameters, experts), None


@dataclasses.dataclass(frozen=True)
class Linear(Head):
    """A linear map.

    Attributes:
        bias: True adds a learned bias (gpt-oss).
        init: Initialiser of the kernel: ``scaled`` by fan-in, as in all layers; ``normal`` with
            standard deviation 0.02 (flaxformer); ``zeros`` (Shazeer 2017, appendix A).
    """

    bias: bool = False
    init: Literal["scaled", "normal", "zeros"] = "scaled"

    def parameters(self, width: int, experts: int, planes: int) -> dict[str, Parameter]:
        """Returns ``kernel (M, E)`` or ``(M, E, P)``, and ``bias (E,)`` or ``(E, P)``."""
        shape: tuple[int, ...] = (width, experts)
        axes: tuple[str, ...] = ("embed", "router")
        if planes > 1:
            shape, axes = (*shape, planes), (*axes, "router")
        inits: dict[str, tuple[Init, float]] = {
            "scaled": ("fan_in", float(width)),
            "normal": ("normal", 0.02),
            "zeros": ("zeros", 0.0),
        }
        parameters = {"kernel": Parameter(shape, axes, *inits[self.init])}
        if self.bias:
            parameters["bias"] = Parameter(shape[1:], axes[1:], "zeros")
        return parameters

    def logits(
        self, x: Float[Array, "*B M"], parameters: Mapping[str, Array], experts: int
    ) -> Float[Array, "*B E"] | Float[Array, "*B E P"]:
        """Returns ``x kernel + bias``."""
        del experts
        kernel = parameters["kernel"].astype(x.dtype)
        product = "...m,me->...e" if kernel.ndim == 2 else "...m,mep->...ep"
        logits = wide_einsum(product, x, kernel)
        return logits + parameters["bias"].astype(logits.dtype) if self.bias else logits


@dataclasses.dataclass(frozen=True)
class Cosine(Head):
    """Products of projected tokens and normalised expert embeddings (X-MoE, 2204.09179).

    Attributes:
        dim: Dimension ``D`` of the embeddings.
        unit_tokens: True also divides the projected token by its norm, as the paper's cosine does;
            torchscale's code divides only the embeddings.
    """

    dim: Positive = 16
    unit_tokens: bool = False

    def parameters(self, width: int, experts: int, planes: int) -> dict[str, Parameter]:
        """Returns ``projection (M, D)`` and ``embedding (E, D)``."""
        del planes
        return {
            "projection": Parameter((width, self.dim), ("embed", "router"), "fan_in", float(width)),
            "embedding": Parameter((experts, self.dim), ("router", "router"), "orthogonal", 0.32),
        }

    def logits(
        self, x: Float[Array, "*B M"], parameters: Mapping[str, Array], experts: int
    ) -> Float[Array, "*B E"]:
        """Returns the product of each token and each unit embedding."""
        del experts
        token = wide_einsum("...m,md->...d", x, parameters["projection"].astype(x.dtype))
        token = (_unit(token) if self.unit_tokens else token).astype(x.dtype)
        embedding = _unit(parameters["embedding"]).astype(x.dtype)
        return wide_einsum("...d,ed->...e", token, embedding)


@dataclasses.dataclass(frozen=True)
class UnitSlots(Head):
    """Products of normalised tokens and normalised slots, times a learned scale (2308.00951)."""

    def parameters(self, width: int, experts: int, planes: int) -> dict[str, Parameter]:
        """Returns ``slots (M, E, P)`` and ``log_scale ()``; the scale is 1 at the start."""
        axes = ("embed", "router", "router")
        return {
            "slots": Parameter((width, experts, planes), axes, "fan_in", float(width)),
            "log_scale": Parameter((), (), "zeros"),
        }

    def logits(
        self, x: Float[Array, "*B M"], parameters: Mapping[str, Array], experts: int
    ) -> Float[Array, "*B E P"]:
        """Returns the product of each token and each slot, ``(..., E, P)``."""
        del experts
        slots = parameters["slots"]
        slots = jnp.exp(parameters["log_scale"]) * _unit(slots, axis=0)
        return wide_einsum("...m,mep->...ep", _unit(x), slots.astype(x.dtype))


@dataclasses.dataclass(frozen=True)
class NoHead(Head):
    """Logits of zero, without parameters, for routers that do not read the tokens."""

    def parameters(self, width: int, experts: int, planes: int) -> dict[str, Parameter]:
        """Returns no parameters."""
        del width, experts, planes
        return {}

    def logits(
        self, x: Float[Array, "*B M"], parameters: Mapping[str, Array], experts: int
    ) -> Float[Array, "*B E"]:
        """Returns zeros."""
        del parameters
        return jnp.zeros((*x.shape[:-1], experts), jnp.float32)


def _unit(x: Float[Array, "*D"], axis: int = -1) -> Float[Array, "*D"]:
    """Returns ``x`` divided by its norm, and zeros where ``x`` is zero, such as in padding."""
    # Dividing by the largest entry first keeps every square within the range of its type.
    largest = jax.lax.stop_gradient(jnp.abs(x).max(axis, keepdims=True))
    x = x / jnp.where(largest > 0, largest, 1)
    square = (x * x).sum(axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(largest > 0, square, 1))
