"""Heads that read values of the MoE layer before: those of MoE++ and ZAYA1.

The values are one array ``(..., D)``. They are zero for the first MoE layer of a stack, pass
unchanged through layers whose head does not read them, and have gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxtyping import Array, Float

from moe_jax.errors import ConfigError
from moe_jax.precision import wide_einsum
from moe_jax.ranges import Epsilon, Positive
from moe_jax.routing.head import Head, Linear, Parameter
from moe_jax.routing.normed_heads import NormedMLP


@dataclasses.dataclass(frozen=True)
class ResidualLinear(Head):
    """A linear map of the token plus one of the logits of the MoE layer before (MoE++, 2410.07348).

    ``logits[l] = W[l] x + V[l] logits[l - 1]`` (equation 6), so ``D`` is the number of experts.
    """

    def parameters(self, width: int, experts: int, planes: int) -> dict[str, Parameter]:
        """Returns ``kernel (M, E)`` and ``residual (E, E)``.

        Raises:
            ConfigError: If the router reads several logits per token and expert.
        """
        if planes > 1:
            raise ConfigError(
                f"ResidualLinear has one logit per token and expert, but this router reads {planes}"
                ": set its head to Linear"
            )
        residual = Parameter((experts, experts), ("router", "router"), "fan_in", float(experts))
        return Linear().parameters(width, experts, planes) | {"residual": residual}

    def logits(
        self, x: Float[Array, "*B M"], parameters: Mapping[str, Array], experts: int
    ) -> Float[Array, "*B E"]:
        """Returns the logits of the first MoE layer."""
        return Linear().logits(x, parameters, experts)

    def carried_width(self, experts: int) -> int:
        """Returns ``E``."""
        return experts

    def read(
        self,
        x: Float[Array, "*B M"],
        parameters: Mapping[str, Array],
        experts: int,
        carried: Float[Array, "*B D"] | None,
    ) -> tuple[Float[Array, "*B E"], Float[Array, "*B D"]]:
        """Returns the logits twice: for this layer and for the next."""
        logits = self.logits(x, parameters, experts)
        if carried is not None:
            residual = parameters["residual"].astype(x.dtype)
            logits = logits + wide_einsum("...d,de->...e", carried.astype(x.dtype), residual)
        return logits, logits


@dataclasses.dataclass(frozen=True)
class ResidualMLP(Head):
    """``NormedMLP`` on the sum of its projection and the scaled sum of the layer before (ZAYA1).

    ``sum[l] = down[l] x + scale[l] * sum[l - 1]`` (``transformers``), so ``D`` is ``dim``.

    Attributes:
        dim: Width ``D`` of the projection and of the hidden layers.
        epsilon: Added to the mean square in the norm.
    """

    dim: Positive = 256
    epsilon: Epsilon = 1e-5

    @property
    def _network(self) -> NormedMLP:
        return NormedMLP(self.dim, self.epsilon)

    def parameters(self, width: int, experts: int, planes: int) -> dict[str, Parameter]:
        """Returns the parameters of ``NormedMLP``, and ``carried_scale (D,)``."""
        scale = Parameter((self.dim,), ("router",), "ones")
        return self._network.parameters(width, experts, planes) | {"carried_scale": scale}

    def logits(
        self, x: Float[Array, "*B M"], parameters: Mapping[str, Array], experts: int
    ) -> Float[Array, "*B E"]:
        """Returns the logits of the first MoE layer."""
        return self._network.logits(x, parameters, experts)

    def carried_width(self, experts: int) -> int:
        """Returns ``dim``."""
        del experts
        return self.dim

    def read(
        self,
        x: Float[Array, "*B M"],
        parameters: Mapping[str, Array],
        experts: int,
        carried: Float[Array, "*B D"] | None,
    ) -> tuple[Float[Array, "*B E"], Float[Array, "*B D"]]:
        """Returns the logits, and the sum that the next layer reads."""
        del experts
        total = self._network.projected(x, parameters)
        if carried is not None:
            total = total + carried * parameters["carried_scale"]
        return self._network.logits_of(total, parameters, x.dtype), total
