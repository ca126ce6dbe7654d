"""Selections in which experts choose tokens, or mixtures of tokens."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.ranges import Iterations, Positive, Range, Ranged
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.select.base import ExpertChoice, Select, SoftChoice

# A score of at most 1 divided by a temperature in this range is far below the largest float32.
Temperature = Annotated[float, Range(1e-9, 1e6)]


@dataclasses.dataclass(frozen=True)
class Cap(Ranged):
    """A bound on the experts per token (Zhou et al. 2022, 2202.09368, section 3.3).

    Dykstra's alternating projections solve an entropy-regularised linear program in logarithms.
    The paper projects on three sets in turn. This code projects on two sets, because it treats an
    expert's capacity and its bound of one slot per token as one set, which takes fewer iterations.
    After 100 iterations some tokens still exceed ``b``, most often if the capacity factor is ``b``,
    because every token must then have exactly ``b`` experts.

    Attributes:
        experts: ``b``, the largest number of experts per token.
        entropy: ``lambda``, the weight of the entropy.
        iterations: Number of iterations of both projections.
    """

    experts: Positive = 2
    entropy: Temperature = 1e-3
    iterations: Iterations = 100

    def __call__(
        self,
        scores: Float[Array, "S E"],
        valid: Bool[Array, " S"],
        capacity: int,
        limit: Int[Array, ""] | None = None,
    ) -> Float[Array, "S E"]:
        """Returns the logarithm of the solution ``(S, E)``, ``-inf`` for padding.

        Args:
            scores: Scores ``(S, E)``.
            valid: Mask ``(S,)``, False for padding.
            capacity: ``C``, slots per expert.
            limit: Slots per expert that tokens can fill, at most ``C``; ``None`` for all slots.
        """
        slots = jnp.int32(capacity) if limit is None else limit
        start = jnp.where(valid[:, None], scores / self.entropy, -jnp.inf)
        bound = jnp.log(jnp.asarray(self.experts, scores.dtype))

        def project(_: Array, carried: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            plan, expert_rest, token_rest = carried
            # Dykstra's method adds the last correction of a set before it projects on it again.
            target = plan + expert_rest
            plan = _filled(target, capacity, slots, valid)
            expert_rest = jnp.where(valid[:, None], target - plan, 0.0)
            target = plan + token_rest
            over = jnp.maximum(jax.nn.logsumexp(target, axis=1, keepdims=True) - bound, 0.0)
            return target - over, expert_rest, over

        zeros = jnp.zeros_like(scores), jnp.zeros_like(scores[:, :1])
        return jax.lax.fori_loop(0, self.iterations, project, (start, *zeros))[0]


def _filled(
    plan: Float[Array, "S E"], capacity: int, limit: Int[Array, ""], valid: Bool[Array, " S"]
) -> Float[Array, "S E"]:
    """Returns each expert's column scaled to sum to ``limit``, no entry above 1, in logarithms.

    The largest ``m`` entries become 1 and the other entries share ``limit - m``, for the least
    possible ``m``. The limit is at most the capacity.
    """
    capacity = min(capacity, plan.shape[0])
    limit = jnp.minimum(limit, capacity)
    largest, which = jax.lax.top_k(plan.T, capacity)
    others = jax.vmap(lambda column, rows: column.at[rows].set(-jnp.inf))(plan.T, which)
    others = jax.nn.logsumexp(others, axis=1, keepdims=True)
    rank = jnp.arange(capacity)

    def shift(ones: Int[Array, "E 1"]) -> Float[Array, "E 1"]:
        tail = jnp.where(rank >= ones, largest, -jnp.inf)
        tail = jnp.logaddexp(jax.nn.logsumexp(tail, axis=1, keepdims=True), others)
        return jnp.log((limit - ones).astype(plan.dtype)) - tail

    def fits(ones: Int[Array, "E 1"]) -> Bool[Array, "E 1"]:
        return jnp.take_along_axis(largest, ones, axis=1) + shift(ones) <= 1e-6

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        fit = fits(middle)
        return jnp.where(fit, low, middle + 1), jnp.where(fit, middle, high)

    # If m ones are possible, so are m + 1, and bisection finds the least m.
    low = jnp.zeros((plan.shape[1], 1), jnp.int32)
    steps = (capacity - 1).bit_length()
    _, least = jax.lax.fori_loop(0, steps, halve, (low, low + limit - 1))
    # If there are no more tokens than slots, all entries are 1.
    everyone = (valid.sum() <= limit) | ~fits(least)
    filled = jnp.where(everyone, 0.0, jnp.minimum(plan.T + shift(least), 0.0)).T
    return jnp.where(valid[:, None], filled, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class TopTokens(Select):
    """Every expert chooses its ``C`` best tokens (Expert Choice, Zhou et al. 2022, section 3.2).

    Attributes:
        average: True divides a token's gates by the number of experts that chose it
            (Mesh-TensorFlow).
        cap: Bound on the experts per token, or ``None``.
    """

    average: bool = False
    cap: Cap | None = None

    experts_choose = True

    def choices(self, num_experts: int) -> int:
        """Returns 1, so that a token has on average as many experts as the capacity factor."""
        del num_experts
        return 1

    def gate(self) -> str:
        """Returns a description of the combine weight, for the table of routers."""
        return "score / experts that took the token" if self.average else "score"

    def __call__(self, scored: Scored, inputs: Inputs) -> ExpertChoice:
        """Returns the choices of one group."""
        scores, valid = scored.scores, inputs.valid
        ranking = jax.lax.stop_gradient(scored.log_scores)
        if self.cap is not None:
            ranking = self.cap(jax.lax.stop_gradient(scores), valid, inputs.capacity, inputs.limit)
        ranking = jnp.where(valid[:, None], ranking, -jnp.inf)
        _, token = jax.lax.top_k(ranking.T, inputs.capacity)
        gate = jnp.take_along_axis(scores.T, token, axis=1)
        filled = valid[token]
        if inputs.limit is not None:
            # The tokens of an expert are sorted, best first.
            filled &= jnp.arange(inputs.capacity) < inputs.limit
        if self.average:
            ones = 1 if inputs.limit is None else filled.reshape(-1).astype(scores.dtype)
            takers = jnp.zeros_like(scores[:, 0]).at[token.reshape(-1)].add(ones)
            gate = gate / (takers[token] if inputs.limit is None else jnp.maximum(takers[token], 1))
        return ExpertChoice(token.astype(jnp.int32), gate, filled)


@dataclasses.dataclass(frozen=True)
class SoftSlots(Select):
    """Slots are weighted means of all tokens, and outputs are means of all slots (2308.00951).

    The dispatch weights are a softmax over tokens, the combine weights a softmax over all slots.

    Attributes:
        per_expert: Slots per expert, independent of the number of tokens.
    """

    per_expert: Positive = 1

    experts_choose = True
    slot_table = False

    def choices(self, num_experts: int) -> int:
        """Returns ``K``, here ``E``: every token has a share in every expert."""
        return num_experts

    def planes(self) -> int:
        """Returns the number of slots per expert, each of which has its own logits."""
        return self.per_expert

    def slots(self) -> int:
        """Returns the number of slots per expert."""
        return self.per_expert

    def gate(self) -> str:
        """Returns a description of the combine weight, for the table of routers."""
        return "softmax over all slots"

    def __call__(self, scored: Scored, inputs: Inputs) -> SoftChoice:
        """Returns the dispatch and combine weights of one group."""
        del scored
        logits, valid = inputs.planes, inputs.valid[:, None, None]
        masked = jnp.where(valid, logits, jnp.finfo(logits.dtype).min)
        dispatch = jax.nn.softmax(masked, axis=0) * valid
        combine = jax.nn.softmax(logits.reshape(logits.shape[0], -1), axis=1)
        return SoftChoice(dispatch, combine.reshape(logits.shape) * valid)
