"""How many slots an expert has, and which wishes get one."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.routing.plan import Counts, Slots
from moe_jax.routing.select import ExpertChoice, Selection, TokenChoice

Array = jax.Array

_BLOCK = 64
# 1.1 * 50 / 5 is 11.000000000000002, which is 11.
_ROUND = {"floor": math.floor, "round": round, "ceil": lambda share: math.ceil(round(share, 9))}


@dataclasses.dataclass(frozen=True)
class Capacity:
    """The capacity rule.

    Attributes:
        factor: slots per expert in training, relative to an even share of ``S / E``.
        eval_factor: the same without dropout, jitter and gradients.
        minimum: an expert has at least so many slots (never more than ``S``).
        rounding: of ``factor * S / E``.
        per_choice: multiply by ``K``: V-MoE counts the factor per assignment, not per token.
        priority: who is seated first. ``choice``: all first choices before any second, tokens in
            order; ``token``: token by token, all its choices; ``score``: as ``choice``, tokens in
            order of their best score (batch-prioritised routing, V-MoE).
        renormalize: divide a token's gates by the sum over those that got a slot (fairseq).
    """

    factor: float = 1.25
    eval_factor: float = 2.0
    minimum: int = 4
    rounding: Literal["floor", "round", "ceil"] = "ceil"
    per_choice: bool = False
    priority: Literal["choice", "token", "score"] = "choice"
    renormalize: bool = False

    def slots(self, num_tokens: int, num_experts: int, choices: int, *, train: bool) -> int:
        """Returns ``C`` for a group of ``num_tokens`` and ``choices`` experts per token."""
        factor = self.factor if train else self.eval_factor
        share = factor * num_tokens * (choices if self.per_choice else 1) / num_experts
        return min(num_tokens, max(self.minimum, _ROUND[self.rounding](share)))

    def seat(
        self, selection: Selection, scores: Array, valid: Array, capacity: int
    ) -> tuple[Slots, Counts]:
        """Gives slots to the wishes of one group.

        Args:
            selection: the wishes.
            scores: ``(S, E)``, read by ``priority="score"`` alone.
            valid: ``(S,)`` bool, False for padding.
            capacity: ``C``.

        Returns:
            The slots, and the counts of who got one.
        """
        if isinstance(selection, ExpertChoice):
            return _expert_slots(selection, valid, scores.shape[1])
        return self._token_slots(selection, scores, valid, capacity)

    def _token_slots(
        self, choice: TokenChoice, scores: Array, valid: Array, capacity: int
    ) -> tuple[Slots, Counts]:
        num_tokens, num_experts = scores.shape
        position = self._positions(choice, scores)
        seated = choice.wanted & (position < capacity)
        gate = jnp.where(seated, choice.gate, 0.0)
        if self.renormalize:
            gate = gate / jnp.maximum(gate.sum(-1, keepdims=True), jnp.finfo(gate.dtype).eps)
        none = num_experts * capacity
        place = jnp.where(seated, choice.expert * capacity + position, none).astype(jnp.int32)
        k = choice.expert.shape[1]
        wish = jnp.arange(num_tokens * k, dtype=jnp.int32)
        occupant = jnp.full((none,), num_tokens * k, jnp.int32)
        occupant = occupant.at[place.reshape(-1)].set(wish, mode="drop", unique_indices=False)
        weight = jnp.take(gate.reshape(-1), occupant, mode="fill", fill_value=0)
        shape = (num_experts, capacity)
        slots = Slots(
            (occupant // k).reshape(shape), weight.reshape(shape), place, gate, num_tokens
        )
        counts = Counts(
            demand=_histogram(choice.expert, choice.wanted, num_experts),
            load=_histogram(choice.expert, seated, num_experts),
            unrouted=_total(valid & ~seated.any(-1)),
            valid=_total(valid),
        )
        return slots, counts

    def _positions(self, choice: TokenChoice, scores: Array) -> Array:
        """Returns ``(S, K)``: how many wishes stand before each one in its expert's queue."""
        expert, queued = choice.expert, choice.queued
        order = None
        if self.priority == "score":
            best = jax.lax.stop_gradient(scores.max(-1))
            order = jnp.argsort(-best, stable=True)
            expert, queued = expert[order], queued[order]
        if self.priority != "token":
            expert, queued = expert.T, queued.T
        flat = expert.reshape(-1)
        wishes = (flat[:, None] == jnp.arange(scores.shape[1])) & queued.reshape(-1, 1)
        before = exclusive_cumsum(wishes.astype(jnp.float32))
        position = jnp.take_along_axis(before, flat[:, None], axis=1).astype(jnp.int32)
        position = position.reshape(expert.shape)
        position = position if self.priority == "token" else position.T
        if order is None:
            return position
        return jnp.zeros_like(position).at[order].set(position, unique_indices=True)


def exclusive_cumsum(x: Array) -> Array:
    """Returns the sum of the earlier rows for each row of ``x (N, E)``.

    Triangular matrix products over blocks of rows: exact for counts below 2**24, and several times
    faster than a scan on every backend, the matrix units being what they are.
    """
    rows, columns = x.shape
    blocks = -(-rows // _BLOCK)
    x = jnp.pad(x, ((0, blocks * _BLOCK - rows), (0, 0))).reshape(blocks, _BLOCK, columns)
    earlier = jnp.tril(jnp.ones((_BLOCK, _BLOCK), x.dtype), -1)
    highest = jax.lax.Precision.HIGHEST
    within = jnp.einsum("st,nte->nse", earlier, x, precision=highest)
    totals = jnp.cumsum(x.sum(1), axis=0)
    before = totals - x.sum(1)
    return (within + before[:, None, :]).reshape(-1, columns)[:rows]


def _expert_slots(choice: ExpertChoice, valid: Array, num_experts: int) -> tuple[Slots, Counts]:
    num_tokens = valid.shape[0]
    token = jnp.where(choice.filled, choice.token, num_tokens)
    weight = jnp.where(choice.filled, choice.gate, 0.0)
    slots = Slots(token, weight, None, None, num_tokens)
    taken = jnp.zeros((num_tokens,), bool).at[token.reshape(-1)].set(True, mode="drop")
    load = choice.filled.sum(-1).astype(jnp.float32)
    return slots, Counts(load, load, _total(valid & ~taken), _total(valid))


def _histogram(expert: Array, mask: Array, num_experts: int) -> Array:
    hits = (expert[..., None] == jnp.arange(num_experts)) & mask[..., None]
    return hits.sum((0, 1)).astype(jnp.float32)


def _total(mask: Array) -> Array:
    return mask.sum().astype(jnp.float32)
