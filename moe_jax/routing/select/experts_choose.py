"""Experts choose tokens, or mixtures of them."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from moe_jax.ranges import Iterations, Positive, Range, Ranged
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.select.base import ExpertChoice, Select, SoftChoice

Array = jax.Array
# Scores of up to 1 are divided by it and stay far below the largest float32.
Temperature = Annotated[float, Range(1e-9, 1e6)]


@dataclasses.dataclass(frozen=True)
class Cap(Ranged):
    """A bound on the experts per token (Zhou et al. 2022, 2202.09368, section 3.3).

    Entropy-regularised linear program, solved by Dykstra's alternating projections in logarithms.
    The paper projects on three sets in turn; here on two, an expert's share and its bound of one
    slot per token being one set, which takes fewer iterations. 100 of them still leave some tokens
    above ``b``, most where the capacity factor is ``b`` itself and every token must get exactly it.

    Attributes:
        experts: ``b``, the most experts a token gets.
        entropy: ``lambda``.
        iterations: of the projections.
    """

    experts: Positive = 2
    entropy: Temperature = 1e-3
    iterations: Iterations = 100

    def __call__(self, scores: Array, valid: Array, capacity: int) -> Array:
        """Returns the logarithm of the plan ``(S, E)``; ``-inf`` for padding."""
        start = jnp.where(valid[:, None], scores / self.entropy, -jnp.inf)
        bound = jnp.log(jnp.asarray(self.experts, scores.dtype))

        def project(_: int, carried: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            plan, expert_rest, token_rest = carried
            # What a projection takes away it gives back before the next, as Dykstra has it.
            wanted = plan + expert_rest
            plan = _filled(wanted, capacity, valid)
            expert_rest = jnp.where(valid[:, None], wanted - plan, 0.0)
            wanted = plan + token_rest
            over = jnp.maximum(jax.nn.logsumexp(wanted, axis=1, keepdims=True) - bound, 0.0)
            return wanted - over, expert_rest, over

        zeros = jnp.zeros_like(scores), jnp.zeros_like(scores[:, :1])
        return jax.lax.fori_loop(0, self.iterations, project, (start, *zeros))[0]


def _filled(plan: Array, capacity: int, valid: Array) -> Array:
    """Scales every expert's column to sum to ``C`` with no entry above 1, in logarithms.

    The largest ``m`` entries are 1 and the others share ``C - m``, for the least ``m`` that fits.
    """
    capacity = min(capacity, plan.shape[0])
    largest, which = jax.lax.top_k(plan.T, capacity)
    others = jax.vmap(lambda column, rows: column.at[rows].set(-jnp.inf))(plan.T, which)
    others = jax.nn.logsumexp(others, axis=1, keepdims=True)
    rank = jnp.arange(capacity)

    def shift(ones: Array) -> Array:
        tail = jnp.where(rank >= ones, largest, -jnp.inf)
        tail = jnp.logaddexp(jax.nn.logsumexp(tail, axis=1, keepdims=True), others)
        return jnp.log((capacity - ones).astype(plan.dtype)) - tail

    def fits(ones: Array) -> Array:
        return jnp.take_along_axis(largest, ones, axis=1) + shift(ones) <= 1e-6

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        fit = fits(middle)
        return jnp.where(fit, low, middle + 1), jnp.where(fit, middle, high)

    # Whatever fits with m ones fits with more.
    low = jnp.zeros((plan.shape[1], 1), jnp.int32)
    steps = (capacity - 1).bit_length()
    _, least = jax.lax.fori_loop(0, steps, halve, (low, low + capacity - 1))
    # Fewer tokens than slots: all of them are 1.
    everyone = (valid.sum() <= capacity) | ~fits(least)
    filled = jnp.where(everyone, 0.0, jnp.minimum(plan.T + shift(least), 0.0)).T
    return jnp.where(valid[:, None], filled, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class TopTokens(Select):
    """Every expert takes its ``C`` best tokens (Expert Choice, Zhou et al. 2022, section 3.2).

    Attributes:
        average: divide a token's gates by the number of experts that took it (Mesh-TensorFlow).
        cap: bound on the experts per token.
    """

    average: bool = False
    cap: Cap | None = None

    experts_choose = True

    def choices(self, num_experts: int) -> int:
        """Returns 1: a capacity factor of c gives every token c experts on average."""
        del num_experts
        return 1

    def gate(self) -> str:
        """Returns in words what the combine weight of a choice is."""
        return "score / experts that took the token" if self.average else "score"

    def __call__(self, scored: Scored, inputs: Inputs) -> ExpertChoice:
        """Selects on one group."""
        scores, valid = scored.scores, inputs.valid
        ranking = jax.lax.stop_gradient(scored.log_scores)
        if self.cap is not None:
            ranking = self.cap(jax.lax.stop_gradient(scores), valid, inputs.capacity)
        ranking = jnp.where(valid[:, None], ranking, -jnp.inf)
        _, token = jax.lax.top_k(ranking.T, inputs.capacity)
        gate = jnp.take_along_axis(scores.T, token, axis=1)
        if self.average:
            takers = jnp.zeros_like(scores[:, 0]).at[token.reshape(-1)].add(1)
            gate = gate / takers[token]
        return ExpertChoice(token.astype(jnp.int32), gate, valid[token])


@dataclasses.dataclass(frozen=True)
class SoftSlots(Select):
    """Slots are mixtures of tokens, and tokens mixtures of slots (Soft MoE, 2308.00951).

    Softmax over the tokens going in, over all slots coming out.

    Attributes:
        per_expert: slots of every expert, whatever the number of tokens.
    """

    per_expert: Positive = 1

    experts_choose = True
    slot_table = False

    def choices(self, num_experts: int) -> int:
        """Returns ``K``: every token is a little in every expert."""
        return num_experts

    def planes(self) -> int:
        """Returns the number of slots: each has its own logits."""
        return self.per_expert

    def slots(self) -> int:
        """Returns the number of slots."""
        return self.per_expert

    def gate(self) -> str:
        """Returns in words what the combine weight of a choice is."""
        return "softmax over all slots"

    def __call__(self, scored: Scored, inputs: Inputs) -> SoftChoice:
        """Mixes one group."""
        del scored
        logits, valid = inputs.planes, inputs.valid[:, None, None]
        masked = jnp.where(valid, logits, jnp.finfo(logits.dtype).min)
        dispatch = jax.nn.softmax(masked, axis=0) * valid
        combine = jax.nn.softmax(logits.reshape(logits.shape[0], -1), axis=1)
        return SoftChoice(dispatch, combine.reshape(logits.shape) * valid)
