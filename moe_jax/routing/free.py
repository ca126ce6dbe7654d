"""Experts without a feed-forward network, which take no slot and need no exchange (MoE++).

A router with such experts scores ``E + Z`` experts. The last ``Z`` of them are free: their outputs
are zero, the token itself, or a mixture of the token and a learned vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.precision import wide_einsum
from moe_jax.ranges import Natural, Ranged
from moe_jax.routing.head import Parameter
from moe_jax.routing.select import TokenChoice


@dataclasses.dataclass(frozen=True)
class FreeExperts(Ranged):
    """The numbers of free experts, which follow the other experts in this order.

    Attributes:
        constant: Experts with the output ``a x + b v``, where ``v`` is learned and ``(a, b)`` is
            the softmax of a linear map of the token ``x`` (MoE++, 2410.07348, equation 5).
        copy: Experts with the output ``x`` (MoE++; LongCat-Flash, 2509.01322).
        zero: Experts with the output zero (MoE++; ZAYA1).
    """

    constant: Natural = 0
    copy: Natural = 0
    zero: Natural = 0

    @property
    def count(self) -> int:
        """``Z``, the number of free experts."""
        return self.constant + self.copy + self.zero

    def parameters(self, width: int) -> dict[str, Parameter]:
        """Returns ``mix (M, N, 2)`` and ``vector (N, M)`` of the ``N`` constant experts."""
        if not self.constant:
            return {}
        mix = (width, self.constant, 2)
        return {
            "mix": Parameter(mix, ("embed", "router", "router"), "fan_in", float(width)),
            "vector": Parameter((self.constant, width), ("router", "embed"), "normal", 1.0),
        }

    def output(
        self,
        x: Float[Array, "*B M"],
        gate: Float[Array, "*B Z"],
        parameters: Mapping[str, Array],
    ) -> Float[Array, "*B M"]:
        """Returns the sum of the free experts' outputs, each times its gate.

        Args:
            x: Tokens ``(..., M)``.
            gate: Gate ``(..., Z)`` of each free expert, 0 if the token did not choose it.
            parameters: The arrays that ``parameters`` describes.
        """
        gate = gate.astype(x.dtype)
        kept = gate[..., self.constant : self.constant + self.copy].sum(-1)
        if not self.constant:
            return kept[..., None] * x
        gate = gate[..., : self.constant]
        logits = wide_einsum("...m,mnp->...np", x, parameters["mix"].astype(x.dtype))
        shares = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
        kept = kept + (gate * shares[..., 0]).sum(-1)
        vector = parameters["vector"].astype(x.dtype)
        constant = wide_einsum("...n,nm->...m", gate * shares[..., 1], vector)
        return kept[..., None] * x + constant.astype(x.dtype)


def split(choice: TokenChoice, num_experts: int) -> tuple[TokenChoice, Bool[Array, "S K"]]:
    """Returns the choices without those of free experts, and the mask ``(S, K)`` of the latter.

    Args:
        choice: Choices among ``E + Z`` experts.
        num_experts: ``E``, the number of experts with slots.
    """
    free = choice.expert >= num_experts
    seated = dataclasses.replace(
        choice,
        expert=jnp.minimum(choice.expert, num_experts - 1),
        wanted=choice.wanted & ~free,
        queued=choice.queued & ~free,
    )
    return seated, choice.wanted & free


def free_gates(
    choice: TokenChoice, taken: Bool[Array, "S K"], num_experts: int, count: int
) -> tuple[Float[Array, "S Z"], Float[Array, " Z"]]:
    """Returns the gates ``(S, Z)`` of the free experts, and the number ``(Z,)`` of their tokens."""
    hits = (choice.expert[..., None] - num_experts == jnp.arange(count)) & taken[..., None]
    gate = jnp.where(hits, choice.gate[..., None], 0).sum(1)
    return gate, hits.sum((0, 1)).astype(jnp.float32)
