"""The routing plan of one group of tokens, in the forms that the transports read.

Letters, used in every module of the package: ``G`` groups, ``S`` tokens per group, ``E`` experts,
``C`` capacity (slots per expert and group), ``K`` experts per token, ``M`` model width, ``F``
expert hidden width, ``H``/``D`` heads and head width, ``V`` vocabulary, ``B``/``L`` batch and
length. A leading ``...`` stands for the group axis that ``jax.vmap`` adds.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Shaped

from moe_jax.routing.balance import Evidence


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts of tokens and choices in a group. All counts are float32 and exclude padding.

    Attributes:
        demand: Choices ``(..., E)`` of each expert, before capacity.
        load: Choices ``(..., E)`` of each expert that got a slot.
        unrouted: Number ``(...,)`` of tokens without a slot in any expert and without a free
            expert.
        valid: Number ``(...,)`` of tokens that are not padding.
        observed: Further sums ``(..., *shape)`` by name, which the router's next state reads.
    """

    demand: Float[Array, "*G E"]
    load: Float[Array, "*G E"]
    unrouted: Float[Array, "*G"]
    valid: Float[Array, "*G"]
    observed: dict[str, Array] = dataclasses.field(default_factory=dict)

    @property
    def overflow(self) -> Float[Array, "*G E"]:
        """Choices ``(..., E)`` of each expert that were dropped because it was full."""
        return self.demand - self.load

    @property
    def dropped(self) -> Float[Array, "*G"]:
        """Number ``(...,)`` of dropped choices, over all experts."""
        return self.overflow.sum(-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The token and the combine weight of every slot of every expert.

    The fields ``place``, ``gate`` and ``expert`` are ``None`` if the experts chose, because a token
    may then have any number of slots.

    Attributes:
        token: Index ``(..., E, C)`` of the token in the slot, ``S`` where the slot is empty.
        weight: Combine weight ``(..., E, C)``, 0 where the slot is empty.
        place: Flat slot ``e * C + c`` of each choice, ``(..., S, K)``; ``E * C`` where the choice
            was dropped; or ``None``.
        gate: Combine weight ``(..., S, K)`` of each choice, 0 where it was dropped; or ``None``.
        expert: Expert ``(..., S, K)`` of each choice, ``-1 - expert`` where it was dropped or
            where the expert is free; or ``None``.
        num_tokens: ``S``.
        wanted: Mask ``(..., S, K)``, False for padding and where a token makes fewer than ``K``
            choices; or ``None``.
    """

    token: Int32[Array, "*G E C"]
    weight: Float[Array, "*G E C"]
    place: Int32[Array, "*G S K"] | None
    gate: Float[Array, "*G S K"] | None
    expert: Int32[Array, "*G S K"] | None
    num_tokens: int = dataclasses.field(metadata={"static": True})
    wanted: Bool[Array, "*G S K"] | None = None

    @property
    def filled(self) -> Bool[Array, "*G E C"]:
        """Mask ``(..., E, C)``, True where the slot holds a token."""
        return self.token < self.num_tokens

    def by_expert(self, values: Shaped[Array, "*G E C"]) -> Shaped[Array, "*G S E"]:
        """Returns the value ``(..., S, E)`` of each token in the slot of each expert, or 0.

        A token has at most one slot of an expert.
        """
        groups, (experts, capacity) = self.token.shape[:-2], self.token.shape[-2:]
        columns = jnp.broadcast_to(jnp.arange(experts)[:, None], (experts, capacity))

        def of_group(token: Array, value: Array) -> Array:
            found = jnp.zeros((self.num_tokens, experts), value.dtype)
            return found.at[token, columns].set(value, mode="drop")

        flat = [x.reshape(-1, experts, capacity) for x in (self.token, values)]
        return jax.vmap(of_group)(*flat).reshape(*groups, self.num_tokens, experts)

    @property
    def dispatch(self) -> Float[Array, "*G S E C"]:
        """GShard's 0/1 tensor ``(..., S, E, C)``: 1 if token s is in slot c of expert e."""
        tokens = jnp.arange(self.num_tokens, dtype=jnp.int32)
        hit = tokens[:, None, None] == self.token[..., None, :, :]
        return hit.astype(jnp.float32)

    @property
    def combine(self) -> Float[Array, "*G S E C"]:
        """Combine weights ``(..., S, E, C)``: ``dispatch`` times the weight of the slot."""
        return self.dispatch * self.weight[..., None, :, :]

    def without(self, removed: Bool[Array, "*G S E"]) -> Slots:
        """Returns the slots without the tokens that ``removed (..., S, E)`` takes from experts.

        A removed choice is a dropped choice: its slot is empty, and the other gates are unchanged.
        """
        _, capacity = self.token.shape[-2:]
        padded = jnp.concatenate([removed, jnp.zeros_like(removed[..., :1, :])], axis=-2)
        lost = jnp.take_along_axis(jnp.swapaxes(padded, -1, -2), self.token, axis=-1)
        token = jnp.where(lost, self.num_tokens, self.token)
        weight = jnp.where(lost, 0, self.weight)
        kept = dataclasses.replace(self, token=token, weight=weight)
        if self.expert is None or self.place is None or self.gate is None:
            return kept
        chosen = jnp.take_along_axis(removed, jnp.maximum(self.expert, 0), axis=-1)
        gone = chosen & (self.expert >= 0)
        return dataclasses.replace(
            kept,
            place=jnp.where(gone, removed.shape[-1] * capacity, self.place),
            gate=jnp.where(gone, 0, self.gate),
            expert=jnp.where(gone, -1 - self.expert, self.expert),
        )

    def with_unit_weights(self) -> Slots:
        """Returns the slots with weight 1 in every slot that holds a token."""
        weight = self.filled.astype(self.weight.dtype)
        gate = None
        if self.gate is not None and self.expert is not None:
            gate = (self.expert >= 0).astype(self.gate.dtype)
        return dataclasses.replace(self, weight=weight, gate=gate)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
    """Slots that each hold a weighted mean of all tokens (Soft MoE).

    Attributes:
        dispatch: Weights ``(..., S, E, C)`` of the tokens in each slot.
        combine: Weights ``(..., S, E, C)`` of the slots in each token.
        num_tokens: ``S``.
    """

    dispatch: Float[Array, "*G S E C"]
    combine: Float[Array, "*G S E C"]
    num_tokens: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The complete output of a router for one group.

    Attributes:
        slots: The tokens and combine weights of all slots.
        losses: The losses ``(...,)`` of the group by name, unweighted.
        counts: Counts of tokens and choices.
        evidence: The arrays that losses over sequences read, if the router has such losses.
        free: Gate ``(..., S, Z)`` of each free expert, if the router has such experts.
    """

    slots: Slots | Mixture
    losses: dict[str, Float[Array, "*G"]]
    counts: Counts
    evidence: Evidence | None = None
    free: Float[Array, "*G S Z"] | None = None

    @property
    def dispatch(self) -> Float[Array, "*G S E C"]:
        """Weight ``(..., S, E, C)`` of token s in slot c of expert e."""
        return self.slots.dispatch

    @property
    def combine(self) -> Float[Array, "*G S E C"]:
        """Weight ``(..., S, E, C)`` of slot c of expert e in token s."""
        return self.slots.combine
