"""The capacity rule: the number of slots per expert, and the choices that get a slot.

The choices of an expert form a queue. A choice gets a slot if its position in the queue is below
the capacity ``C``, and is dropped otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.errors import ConfigError
from moe_jax.ranges import CapacityFactor, Natural, Positive, Ranged, Share
from moe_jax.routing.inputs import Inputs
from moe_jax.routing.plan import Counts, Mixture, Slots
from moe_jax.routing.select import ExpertChoice, Selection, SoftChoice, TokenChoice

_BLOCK = 64
_ROUND: dict[str, Callable[[float], int]] = {
    "floor": math.floor,
    "round": round,
    # 1.1 * 50 / 5 is 11.000000000000002 in floating point, and means 11 slots.
    "ceil": lambda share: math.ceil(round(share, 9)),
}
# A share of float32 is wrong by less than this relative error.
_ERROR = 1e-6
_ROUND_TRACED: dict[str, Callable[[Array], Array]] = {
    "floor": lambda share: jnp.floor(share * (1 + _ERROR)),
    "share": lambda share: jnp.floor(share * (1 + _ERROR)),
    "round": jnp.round,
    "ceil": lambda share: jnp.ceil(share * (1 - _ERROR)),
}


@dataclasses.dataclass(frozen=True)
class Capacity(Ranged):
    """The capacity rule.

    Attributes:
        factor: Slots per expert in training, relative to an even share ``S / E`` of the tokens.
        eval_factor: Slots per expert in evaluation, relative to ``S / E``.
        dropless: Phases in which every expert has ``S`` slots, so that no choice is dropped:
            ``never``, ``eval`` or ``always``.
        eval_fraction: Slots per expert in evaluation as a share of ``S`` (fairseq's
            ``moe_eval_capacity_token_fraction``); 0 selects ``eval_factor``.
        minimum: Least number of slots per expert (never more than ``S``).
        multiple: Slots are rounded up to a multiple of this number (never more than ``S``).
        rounding: Rounding of ``factor * S / E``. ``share`` rounds ``S / E`` up, multiplies by the
            factor and rounds down (fairseq).
        per_choice: True multiplies the slots by ``K``: V-MoE's factor counts choices, not tokens.
        priority: Order of the choices in the queues. ``choice``: all first choices before all
            second choices, each in the order of the tokens; ``token``: all choices of a token
            before the next token; ``score``: as ``choice``, with tokens in the order of their best
            score (batch-prioritised routing, V-MoE).
        reroute: True tries a token's next choice only if its previous choice was dropped, so that
            a token has at most one slot (No-Token-Left-Behind, Switch appendix B).
        devices: Number of groups of neighbouring experts that share a budget of
            ``factor * S * K / devices`` choices; beyond the budget a device drops the choices of
            lowest gate (DeepSeek-V2 section 2.2.4). Each expert then has ``S`` slots. 0 disables
            the budgets.
        renormalize: True divides a token's gates by the sum over its choices with a slot (fairseq,
            where the sum is at least the machine epsilon; here gates of any size sum to 1).
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
        """Raises ``ConfigError`` if ``devices`` does not divide the number of experts."""
        if self.devices and num_experts % self.devices:
            raise ConfigError(
                f"capacity.devices={self.devices} does not divide {num_experts} experts: change it"
            )

    def slots(self, num_tokens: int, num_experts: int, choices: float, *, train: bool) -> int:
        """Returns ``C``, the slots per expert, of a group.

        Args:
            num_tokens: ``S``.
            num_experts: ``E``.
            choices: ``K``, or the mean number of choices per token if it is smaller.
            train: True in training, False in evaluation.
        """
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

    def limit(
        self, inputs: Inputs, num_experts: int, choices: float | Array
    ) -> Int[Array, ""] | None:
        """Returns the slots per expert of this step, from a traced factor or a traced top-k.

        Args:
            inputs: The group; ``inputs.capacity`` is the largest number of slots.
            num_experts: ``E``.
            choices: ``K``, or the mean number of choices per token if it is smaller.

        Returns:
            The number of ``slots``, or ``None`` if the step does not change it. The products are
            float32, whose rounding errors do not add or remove a slot.
        """
        factor = inputs.settings.get("capacity_factor")
        top_k = inputs.settings.get("top_k") if self.per_choice else None
        if inputs.rng is None or not self.shares or (factor is None and top_k is None):
            return None
        tokens = inputs.valid.shape[0]
        share = jnp.float32(self.factor if factor is None else factor)
        share = share * ((choices if top_k is None else top_k) if self.per_choice else 1)
        even = -(-tokens // num_experts) if self.rounding == "share" else tokens / num_experts
        slots = _ROUND_TRACED[self.rounding](share * even)
        slots = jnp.maximum(slots.astype(jnp.int32), self.minimum)
        return jnp.minimum(-(-slots // self.multiple) * self.multiple, inputs.capacity)

    @property
    def shares(self) -> bool:
        """True if the slots in training are a share of the tokens, which ``factor`` sets."""
        return self.dropless != "always" and not self.devices

    def seat(
        self, selection: Selection, scores: Float[Array, "S E"], inputs: Inputs
    ) -> tuple[Slots | Mixture, Counts]:
        """Assigns the choices of one group to slots.

        Args:
            selection: The choices.
            scores: Scores ``(S, E)`` or their logarithms, which only ``priority="score"`` reads.
            inputs: The group; ``inputs.capacity`` is ``C``.

        Returns:
            The slots, and the counts of choices with and without a slot.
        """
        if isinstance(selection, SoftChoice):
            return _mixed(selection, inputs)
        if isinstance(selection, ExpertChoice):
            return _expert_slots(selection, inputs.valid, scores.shape[1])
        return self._token_slots(selection, scores, inputs)

    def _token_slots(
        self, choice: TokenChoice, scores: Float[Array, "S E"], inputs: Inputs
    ) -> tuple[Slots, Counts]:
        valid, capacity = inputs.valid, inputs.capacity
        limit = capacity if inputs.limit is None else inputs.limit
        num_tokens, num_experts = scores.shape
        demand = choice.wanted
        if self.devices:
            choice = self._within_devices(choice, num_experts, train=inputs.rng is not None)
        if self.reroute:
            position, demand = _rerouted(choice, num_experts, limit)
            choice = dataclasses.replace(choice, wanted=demand)
        else:
            position = self._positions(choice, scores)
        seated = choice.wanted & (position < limit)
        gate = jnp.where(seated, choice.gate, 0.0)
        if self.renormalize:
            logs = jnp.where(seated, choice.log_gate, jnp.finfo(gate.dtype).min)
            gate = jnp.where(seated, jax.nn.softmax(logs, axis=-1), 0.0)
        none = num_experts * capacity
        place = jnp.where(seated, choice.expert * capacity + position, none).astype(jnp.int32)
        k = choice.expert.shape[1]
        index = jnp.arange(num_tokens * k, dtype=jnp.int32)
        occupant = jnp.full((none,), num_tokens * k, jnp.int32)
        occupant = occupant.at[place.reshape(-1)].set(index, mode="drop", unique_indices=False)
        weight = jnp.take(gate.reshape(-1), occupant, mode="fill", fill_value=0)
        shape = (num_experts, capacity)
        slots = Slots(
            (occupant // k).reshape(shape),
            weight.reshape(shape),
            place,
            gate,
            jnp.where(seated, choice.expert, -1 - choice.expert),
            num_tokens,
            demand,
        )
        counts = Counts(
            demand=_histogram(choice.expert, demand, num_experts),
            load=_histogram(choice.expert, seated, num_experts),
            unrouted=_total(valid & ~seated.any(-1)),
            valid=_total(valid),
        )
        return slots, counts

    def _positions(self, choice: TokenChoice, scores: Float[Array, "S E"]) -> Int[Array, "S K"]:
        """Returns the position ``(S, K)`` of each choice in the queue of its expert."""
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
        """Drops the choices of lowest gate beyond the budget of each device."""
        if self.dropless == "always" or (self.dropless == "eval" and not train):
            return choice
        tokens, k = choice.expert.shape
        factor = self.factor if train else self.eval_factor
        budget = math.ceil(round(factor * tokens * k / self.devices, 9))
        device = choice.expert.reshape(-1) // (num_experts // self.devices)
        order = jnp.argsort(-jax.lax.stop_gradient(choice.log_gate).reshape(-1), stable=True)
        before = _queue(device[order], choice.wanted.reshape(-1)[order], self.devices)
        within = jnp.zeros((tokens * k,), bool).at[order].set(before < budget).reshape(tokens, k)
        wanted, queued = choice.wanted & within, choice.queued & within
        return dataclasses.replace(choice, wanted=wanted, queued=queued)


def _queue(
    expert: Int[Array, "*N"], queued: Bool[Array, "*N"], num_experts: int
) -> Int[Array, "*N"]:
    """Returns the number of earlier ``queued`` choices of the same expert, in row-major order."""
    flat = expert.reshape(-1)
    choices = (flat[:, None] == jnp.arange(num_experts)) & queued.reshape(-1, 1)
    before = exclusive_cumsum(choices.astype(jnp.float32))
    position = jnp.take_along_axis(before, flat[:, None], axis=1).astype(jnp.int32)
    return position.reshape(expert.shape)


def _rerouted(
    choice: TokenChoice, num_experts: int, capacity: int | Int[Array, ""]
) -> tuple[Int[Array, "S K"], Bool[Array, "S K"]]:
    """Returns the positions ``(S, K)``, and the mask ``(S, K)`` of the choices that were tried."""
    used = jnp.zeros((num_experts,), jnp.int32)
    waiting = jnp.ones(choice.wanted.shape[:1], bool)
    positions, tried = [], []
    for k in range(choice.expert.shape[1]):
        expert, wanted = choice.expert[:, k], choice.wanted[:, k] & waiting
        position = _queue(expert, wanted, num_experts) + used[expert]
        seated = wanted & (position < capacity)
        used += ((expert[:, None] == jnp.arange(num_experts)) & seated[:, None]).sum(0)
        waiting &= ~seated
        positions.append(position)
        tried.append(wanted)
    return jnp.stack(positions, axis=1), jnp.stack(tried, axis=1)


def exclusive_cumsum(x: Float[Array, "N E"]) -> Float[Array, "N E"]:
    """Returns the sum of all earlier rows for each row of ``x (N, E)``.

    The sums are triangular matrix products over blocks of rows. They are exact for counts below
    2**24, and several times faster than a scan on every backend, because matrix units compute them.
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


def _expert_slots(
    choice: ExpertChoice, valid: Bool[Array, " S"], num_experts: int
) -> tuple[Slots, Counts]:
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
    unrouted = jnp.zeros((), jnp.float32)
    counts = Counts(load, load, unrouted, _total(inputs.valid))
    return Mixture(choice.dispatch, choice.combine, tokens), counts


def _histogram(
    expert: Int[Array, "S K"], mask: Bool[Array, "S K"], num_experts: int
) -> Float[Array, " E"]:
    hits = (expert[..., None] == jnp.arange(num_experts)) & mask[..., None]
    return hits.sum((0, 1)).astype(jnp.float32)


def _total(mask: Bool[Array, " S"]) -> Float[Array, ""]:
    return mask.sum().astype(jnp.float32)
