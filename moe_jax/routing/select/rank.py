"""What tokens rank experts by, where that is not the score their gate is read from."""

from __future__ import annotations

import abc
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.errors import ConfigError
from moe_jax.ranges import Iterations, NonNegative, Positive, Ranged
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.part import Part

Array = jax.Array


class Rank(Part, abc.ABC):
    """Scores to a ranking. A subclass is a frozen dataclass."""

    @abc.abstractmethod
    def __call__(self, scored: Scored, inputs: Inputs) -> Array:
        """Returns ``(S, E)``; no gradient flows through it."""


@dataclasses.dataclass(frozen=True)
class Bias(Rank):
    """Score plus a bias that rises for experts with too few tokens (Loss-Free Balancing).

    Wang et al. 2024 (2408.15664), DeepSeek-V3 (2412.19437) section 2.1.2. The bias is state, not a
    parameter: after a step it grows by ``rate`` times the sign of mean load minus load, or times
    that difference as a share of the mean.

    Attributes:
        rate: ``u`` or ``gamma``.
        rule: ``sign`` or ``proportional``.
    """

    rate: NonNegative = 1e-3
    rule: Literal["sign", "proportional"] = "sign"

    def state_shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Returns ``bias (E,)``."""
        return {"bias": (num_experts,)}

    def next_state(self, state: dict[str, Array], demand: Array) -> dict[str, Array]:
        """Returns the bias after a step."""
        mean = demand.mean(-1, keepdims=True)
        error = mean - demand
        step = jnp.sign(error) if self.rule == "sign" else error / jnp.maximum(mean, 1)
        return state | {"bias": state["bias"] + self.rate * step}

    def __call__(self, scored: Scored, inputs: Inputs) -> Array:
        """Returns scores plus bias."""
        bias = inputs.needs_state("bias", "a Bias rank", "(E,) zeros at the start")
        return jax.lax.stop_gradient(scored.scores + bias)


@dataclasses.dataclass(frozen=True)
class Sinkhorn(Rank):
    """Entropic transport plan of the logits in training, the score at test time (S-BASE).

    Clark et al. 2022 (2202.01169), section 3.1; the plan gives every token one unit and every
    expert an even share of them.

    Attributes:
        iterations: of alternating normalisation.
    """

    iterations: Iterations = 30

    def __call__(self, scored: Scored, inputs: Inputs) -> Array:
        """Returns the logarithm of the plan, or the scores without a key."""
        if inputs.rng is None:
            return jax.lax.stop_gradient(scored.noisy)
        logits = jax.lax.stop_gradient(inputs.logits)
        # The plan is the same for logits relative to a token's best one, which keep more digits.
        logits = logits - logits.max(1, keepdims=True)
        logits = jnp.where(inputs.valid[:, None], logits, -jnp.inf)
        share = jnp.log(jnp.maximum(inputs.valid.sum(), 1) / logits.shape[1])

        def normalize(_: int, potentials: tuple[Array, Array]) -> tuple[Array, Array]:
            _, column = potentials
            row = -jax.nn.logsumexp(logits + column, axis=1, keepdims=True)
            row = jnp.where(inputs.valid[:, None], row, 0.0)
            column = share - jax.nn.logsumexp(logits + row, axis=0, keepdims=True)
            return row, jnp.where(jnp.isfinite(column), column, 0.0)

        start = jnp.zeros_like(logits[:, :1]), jnp.zeros_like(logits[:1])
        row, column = jax.lax.fori_loop(0, self.iterations, normalize, start)
        return jnp.where(inputs.valid[:, None], logits + row + column, 0.0)


@dataclasses.dataclass(frozen=True)
class Sampled(Rank):
    """Experts drawn from the softmax of the logits in training, the score at test time.

    Switch (2101.03961) appendix C, "sample softmax"; Mesh-TensorFlow's policy ``sample``. Logits
    plus Gumbel noise rank ``k`` experts as draws without replacement do.
    """

    def __call__(self, scored: Scored, inputs: Inputs) -> Array:
        """Returns the logits with their noise, or the scores without a key."""
        if inputs.rng is None:
            return jax.lax.stop_gradient(scored.noisy)
        logits = jax.lax.stop_gradient(scored.noisy)
        return drawn(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), inputs.rng)


def drawn(logits: Array, rng: Array) -> Array:
    """Returns a ranking ``(S, E)`` that draws from the softmax of ``logits``, by Gumbel noise.

    Logits relative to a token's best one are small where they matter, and so keep all digits of
    the noise.
    """
    logits = logits - logits.max(1, keepdims=True)
    return logits + jax.random.gumbel(rng, logits.shape, logits.dtype)


@dataclasses.dataclass(frozen=True)
class Limit(Ranged):
    """Keeps the experts of a token within a few groups of neighbours, such as devices.

    Attributes:
        groups: number of groups; it divides ``E``.
        keep: groups per token.
        by: a group counts for its best expert (DeepSeek-V2) or the sum of its two best
            (DeepSeek-V3).
    """

    groups: Positive
    keep: Positive
    by: Literal["max", "top2"] = "max"

    def check(self, num_experts: int, k: int) -> None:
        """Raises ``ConfigError`` if the groups cannot hold ``k`` of ``num_experts``."""
        size, rest = divmod(num_experts, self.groups)
        if rest or self.keep > self.groups or self.keep * size < k:
            raise ConfigError(
                f"limit: {self.keep} of {self.groups} groups of {num_experts} experts cannot hold "
                f"{k} per token: change limit.groups or limit.keep"
            )

    def __call__(self, ranking: Array, log_scores: Array | None = None) -> Array:
        """Returns the ranking ``(S, E)`` with ``-inf`` outside the kept groups.

        Args:
            ranking: ``(S, E)``.
            log_scores: ``(S, E)`` logarithms of what a group's experts sum to; without them the
                ranking itself is summed.
        """
        tokens, experts = ranking.shape
        inside = (ranking if log_scores is None else log_scores).reshape(tokens, self.groups, -1)
        best_two = jax.lax.top_k(inside, min(2, inside.shape[-1]))[0]
        total = jnp.sum if log_scores is None else jax.nn.logsumexp
        value = best_two[..., 0] if self.by == "max" else total(best_two, axis=-1)
        kept = jax.lax.top_k(jax.lax.stop_gradient(value), self.keep)[1]
        mask = (kept[..., None] == jnp.arange(self.groups)).any(1)
        mask = jnp.repeat(mask, experts // self.groups, axis=1)
        return jnp.where(mask, ranking, -jnp.inf)
