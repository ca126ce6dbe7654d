"""The router's answer for one group of tokens, and the faces the transports read it by.

Letters, used in every module of the package: ``G`` groups, ``S`` tokens per group, ``E`` experts,
``C`` capacity (slots per expert and group), ``K`` experts per token, ``M`` model width, ``F``
expert hidden width, ``H``/``D`` heads and head width, ``V`` vocabulary, ``B``/``L`` batch and
length. A leading ``...`` stands for the group axis that ``jax.vmap`` adds.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.routing.balance import Evidence

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """What happened to the tokens of a group. All counts are float32 and exclude padding.

    Attributes:
        demand: ``(..., E)`` assignments asked for, before capacity.
        load: ``(..., E)`` assignments that got a slot.
        unrouted: ``(...,)`` tokens that sit in no slot of any expert.
        valid: ``(...,)`` tokens that are not padding.
    """

    demand: Array
    load: Array
    unrouted: Array
    valid: Array

    @property
    def overflow(self) -> Array:
        """``(..., E)`` assignments that found their expert full."""
        return self.demand - self.load

    @property
    def dropped(self) -> Array:
        """``(...,)`` assignments that found their expert full, over all experts."""
        return self.overflow.sum(-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Which token sits in which slot of which expert, and with what combine weight.

    Attributes:
        token: ``(..., E, C)`` int32 index of the token in the slot, ``S`` where it is empty.
        weight: ``(..., E, C)`` combine weight, 0 where the slot is empty.
        place: ``(..., S, K)`` int32 flat slot ``e * C + c`` of each choice, ``E * C`` where it
            got none; ``None`` if the experts chose, since a token may then sit in any number.
        gate: ``(..., S, K)`` combine weight per choice, 0 where it got no slot; ``None`` likewise.
        expert: ``(..., S, K)`` int32 expert of each choice, ``-1 - expert`` where it got no slot;
            ``None`` likewise.
        num_tokens: ``S``.
    """

    token: Array
    weight: Array
    place: Array | None
    gate: Array | None
    expert: Array | None
    num_tokens: int = dataclasses.field(metadata={"static": True})

    @property
    def filled(self) -> Array:
        """``(..., E, C)`` bool, True where a token sits in the slot."""
        return self.token < self.num_tokens

    @property
    def dispatch(self) -> Array:
        """``(..., S, E, C)`` float32 0/1 tensor of GShard: token s sits in slot c of expert e."""
        tokens = jnp.arange(self.num_tokens, dtype=jnp.int32)
        hit = tokens[:, None, None] == self.token[..., None, :, :]
        return hit.astype(jnp.float32)

    @property
    def combine(self) -> Array:
        """``(..., S, E, C)`` combine weights: ``dispatch`` times the weight of the slot."""
        return self.dispatch * self.weight[..., None, :, :]

    def with_unit_weights(self) -> Slots:
        """Returns the slots with weight 1 wherever a token sits."""
        weight = self.filled.astype(self.weight.dtype)
        gate = None if self.gate is None else (self.expert >= 0).astype(self.gate.dtype)
        return dataclasses.replace(self, weight=weight, gate=gate)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
    """Slots that each hold a weighted mean of all tokens (Soft MoE).

    Attributes:
        dispatch: ``(..., S, E, C)`` weights going in.
        combine: ``(..., S, E, C)`` weights coming out.
        num_tokens: ``S``.
    """

    dispatch: Array
    combine: Array
    num_tokens: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """A router's whole answer for one group.

    Attributes:
        slots: who sits where.
        losses: the named losses, unweighted, of the tokens of the group.
        counts: what happened to the tokens.
        evidence: what losses read of each token, if some of them are to be of sequences.
    """

    slots: Slots | Mixture
    losses: dict[str, Array]
    counts: Counts
    evidence: Evidence | None = None

    @property
    def dispatch(self) -> Array:
        """``(..., S, E, C)`` float32: how much of token s goes into slot c of expert e."""
        return self.slots.dispatch

    @property
    def combine(self) -> Array:
        """``(..., S, E, C)``: how much of slot c of expert e comes out in token s."""
        return self.slots.combine
