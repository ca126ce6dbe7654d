"""How many slots an expert has, and which wishes get one."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.errors import ConfigError
from moe_jax.ranges import CapacityFactor, Natural, Positive, Ranged, Share
from moe_jax.routing.inputs import Inputs
from moe_jax.routing.plan import Counts, Mixture, Slots
from moe_jax.routing.select import ExpertChoice, Selection, SoftChoice, TokenChoice

Array = jax.Array

_BLOCK = 64
# 1.1 * 50 / 5 is 11.000000000000002, which is 11.
_ROUND = {"floor": math.floor, "round": round, "ceil": lambda share: math.ceil(round(share, 9))}


@dataclasses.dataclass(frozen=True)
class Capacity(Ranged):
    """The capacity rule.

    Attributes:
        factor: slots per expert in training, relative to an even share of ``S / E``.
        eval_factor: the same without dropout, jitter and gradients.
        dropless: as many slots as tokens, whatever the factors: ``never``, in ``eval`` or
            ``always``.
        eval_fraction: slots per expert in evaluation as a share of ``S``; 0 for ``eval_factor``
            (fairseq's ``moe_eval_capacity_token_fraction``).
        minimum: an expert has at least so many slots (never more than ``S``).
        multiple: round up to a multiple of this (never more than ``S``).
        rounding: of ``factor * S / E``; ``share`` rounds up ``S / E`` before the factor, and then
            down (fairseq).
        per_choice: multiply by ``K``: V-MoE counts the factor per assignment, not per token.
        priority: who is seated first. ``choice``: all first choices before any second, tokens in
            order; ``token``: token by token, all its choices; ``score``: as ``choice``, tokens in
            order of their best score (batch-prioritised routing, V-MoE).
        reroute: a token asks for its next choice only if the last one was full, and sits in one
            slot at most (No-Token-Left-Behind, Switch appendix B).
        devices: groups of neighbouring experts that share their slots: beyond ``factor * S * K``
            over this, a device gives up the choices of lowest gate (DeepSeek-V2 section 2.2.4).
            Slots are then as many as tokens. 0 for none.
        renormalize: divide a token's gates by the sum over those that got a slot (fairseq, whose
            sum is at least the machine epsilon; here gates of any size sum to 1).
    """

    factor: CapacityFactor = 1.25
    eval_factor: CapacityFactor = 2.0
    dropless: Literal["never", "eval", "always"] = "never"
    eval_fraction: Share = 0.0
    minimum: Positive = 4
    multiple: Positive = 1
    rounding: Literal["floor", "round", "ceil", "share"] = "ceil"
    per_choice: bool = False
    priority: Literal["choice", "token", "score"] = "choice"
    reroute: bool = False
    devices: Natural = 0
    renormalize: bool = False

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if the devices do not divide the experts."""
        if self.devices and num_experts % self.devices:
            raise ConfigError(
                f"capacity.devices={self.devices} does not divide {num_experts} experts: change it"
            )

    def slots(self, num_tokens: int, num_experts: int, choices: int, *, train: bool) -> int:
        """Returns ``C`` for a group of ``num_tokens`` and ``choices`` experts per token."""
        dropless = self.dropless == "always" or (self.dropless == "eval" and not train)
        if dropless or self.devices:
            return num_tokens
        if self.eval_fraction and not train:
            return min(num_tokens, math.ceil(round(self.eval_fraction * num_tokens, 9)))
        factor = self.factor if train else self.eval_factor
        factor *= choices if self.per_choice else 1
        if self.rounding == "share":
            slots = math.floor(factor * -(-num_tokens // num_experts))
        else:
            slots = _ROUND[self.rounding](factor * num_tokens / num_experts)
        slots = max(self.minimum, slots)
        return min(num_tokens, -(-slots // self.multiple) * self.multiple)

    def seat(self, selection: Selection, scores: Array, inputs: Inputs) -> tuple[Slots, Counts]:
        """Gives slots to the wishes of one group.

        Args:
            selection: the wishes.
            scores: ``(S, E)`` scores or their logarithms, read by ``priority="score"`` alone.
            inputs: the group; ``inputs.capacity`` is ``C``.

        Returns:
            The slots, and the counts of who got one.
        """
        if isinstance(selection, SoftChoice):
            return _mixed(selection, inputs)
        if isinstance(selection, ExpertChoice):
            return _expert_slots(selection, inputs.valid, scores.shape[1])
        return self._token_slots(selection, scores, inputs)

    def _token_slots(
        self, choice: TokenChoice, scores: Array, inputs: Inputs
    ) -> tuple[Slots, Counts]:
        valid, capacity = inputs.valid, inputs.capacity
        num_tokens, num_experts = scores.shape
        demand = choice.wanted
        if self.devices:
            choice = self._within_devices(choice, num_experts, train=inputs.rng is not None)
        if self.reroute:
            position, demand = _rerouted(choice, num_experts, capacity)
            choice = dataclasses.replace(choice, wanted=demand)
        else:
            position = self._positions(choice, scores)
        seated = choice.wanted & (position < capacity)
        gate = jnp.where(seated, choice.gate, 0.0)
        if self.renormalize:
            logs = jnp.where(seated, choice.log_gate, jnp.finfo(gate.dtype).min)
            gate = jnp.where(seated, jax.nn.softmax(logs, axis=-1), 0.0)
        none = num_experts * capacity
        place = jnp.where(seated, choice.expert * capacity + position, none).astype(jnp.int32)
        k = choice.expert.shape[1]
        wish = jnp.arange(num_tokens * k, dtype=jnp.int32)
        occupant = jnp.full((none,), num_tokens * k, jnp.int32)
        occupant = occupant.at[place.reshape(-1)].set(wish, mode="drop", unique_indices=False)
        weight = jnp.take(gate.reshape(-1), occupant, mode="fill", fill_value=0)
        shape = (num_experts, capacity)
        slots = Slots(
            (occupant // k).reshape(shape),
            weight.reshape(shape),
            place,
            gate,
            jnp.where(seated, choice.expert, -1 - choice.expert),
            num_tokens,
        )
        counts = Counts(
            demand=_histogram(choice.expert, demand, num_experts),
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
        position = _queue(expert, queued, scores.shape[1])
        position = position if self.priority == "token" else position.T
        if order is None:
            return position
        return jnp.zeros_like(position).at[order].set(position, unique_indices=True)

    def _within_devices(self, choice: TokenChoice, num_experts: int, *, train: bool) -> TokenChoice:
        """Gives up the choices of lowest gate beyond each device's budget."""
        if self.dropless == "always" or (self.dropless == "eval" and not train):
            return choice
        tokens, k = choice.expert.shape
        factor = self.factor if train else self.eval_factor
        budget = math.ceil(round(factor * tokens * k / self.devices, 9))
        device = choice.expert.reshape(-1) // (num_experts // self.devices)
        order = jnp.argsort(-jax.lax.stop_gradient(choice.log_gate).reshape(-1), stable=True)
        before = _queue(device[order], choice.wanted.reshape(-1)[order], self.devices)
        kept = jnp.zeros((tokens * k,), bool).at[order].set(before < budget).reshape(tokens, k)
        return dataclasses.replace(choice, wanted=choice.wanted & kept, queued=choice.queued & kept)


def _queue(expert: Array, queued: Array, num_experts: int) -> Array:
    """Returns how many ``queued`` entries of the same expert stand before each, row by row."""
    flat = expert.reshape(-1)
    wishes = (flat[:, None] == jnp.arange(num_experts)) & queued.reshape(-1, 1)
    before = exclusive_cumsum(wishes.astype(jnp.float32))
    position = jnp.take_along_axis(before, flat[:, None], axis=1).astype(jnp.int32)
    return position.reshape(expert.shape)


def _rerouted(choice: TokenChoice, num_experts: int, capacity: int) -> tuple[Array, Array]:
    """Returns ``(S, K)`` positions, and which choices were asked for in the end."""
    used = jnp.zeros((num_experts,), jnp.int32)
    standing = jnp.ones(choice.wanted.shape[:1], bool)
    positions, asked = [], []
    for k in range(choice.expert.shape[1]):
        expert, wanted = choice.expert[:, k], choice.wanted[:, k] & standing
        position = _queue(expert, wanted, num_experts) + used[expert]
        seated = wanted & (position < capacity)
        used += ((expert[:, None] == jnp.arange(num_experts)) & seated[:, None]).sum(0)
        standing &= ~seated
        positions.append(position)
        asked.append(wanted)
    return jnp.stack(positions, axis=1), jnp.stack(asked, axis=1)


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
    slots = Slots(token, weight, None, None, None, num_tokens)
    taken = jnp.zeros((num_tokens,), bool).at[token.reshape(-1)].set(True, mode="drop")
    load = choice.filled.sum(-1).astype(jnp.float32)
    return slots, Counts(load, load, _total(valid & ~taken), _total(valid))


def _mixed(choice: SoftChoice, inputs: Inputs) -> tuple[Mixture, Counts]:
    tokens, experts, slots = choice.dispatch.shape
    load = jnp.full((experts,), slots, jnp.float32) * inputs.valid.any()
    nobody = jnp.zeros((), jnp.float32)
    counts = Counts(load, load, nobody, _total(inputs.valid))
    return Mixture(choice.dispatch, choice.combine, tokens), counts


def _histogram(expert: Array, mask: Array, num_experts: int) -> Array:
    hits = (expert[..., None] == jnp.arange(num_experts)) & mask[..., None]
    return hits.sum((0, 1)).astype(jnp.float32)


def _total(mask: Array) -> Array:
    return mask.sum().astype(jnp.float32)
