"""Rankings of experts by other values than the scores from which gates are read."""

from __future__ import annotations

import abc
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from moe_jax.errors import ConfigError
from moe_jax.ranges import Iterations, Positive, Ranged
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.part import Part


class Rank(Part, abc.ABC):
    """The map from scores to a ranking of experts. A subclass is a frozen dataclass."""

    @abc.abstractmethod
    def __call__(self, scored: Scored, inputs: Inputs) -> Float[Array, "S E"]:
        """Returns the ranking ``(S, E)``, best highest; no gradient flows through it."""

    def observe(self, scored: Scored, k: int, inputs: Inputs) -> dict[str, Array]:
        """Returns sums over the tokens of a group that ``next_state`` reads, besides the demand.

        Args:
            scored: Scores of the group.
            k: Experts per token.
            inputs: The group.
        """
        del scored, k, inputs
        return {}


@dataclasses.dataclass(frozen=True)
class Sinkhorn(Rank):
    """The balanced assignment by Sinkhorn's algorithm in training, the logits in evaluation.

    Clark et al. 2022 (S-BASE, 2202.01169, section 3.1) define the entropic transport plan, which
    assigns one unit to every token and an even share of the tokens to every expert.

    Attributes:
        iterations: Number of normalisations over tokens and over experts.
    """

    iterations: Iterations = 30

    def __call__(self, scored: Scored, inputs: Inputs) -> Float[Array, "S E"]:
        """Returns the logarithm of the plan, or the logits behind the scores without a key."""
        if inputs.rng is None:
            return jax.lax.stop_gradient(scored.noisy)
        logits = jax.lax.stop_gradient(inputs.logits)
        # A constant per token does not change the plan, and logits relative to the best one have
        # smaller rounding errors.
        logits = logits - logits.max(1, keepdims=True)
        logits = jnp.where(inputs.valid[:, None], logits, -jnp.inf)
        share = jnp.log(jnp.maximum(inputs.valid.sum(), 1) / logits.shape[1])

        def normalize(_: Array, potentials: tuple[Array, Array]) -> tuple[Array, Array]:
            column = potentials[1]
            row = -jax.nn.logsumexp(logits + column, axis=1, keepdims=True)
            row = jnp.where(inputs.valid[:, None], row, 0.0)
            column = share - jax.nn.logsumexp(logits + row, axis=0, keepdims=True)
            return row, jnp.where(jnp.isfinite(column), column, 0.0)

        start = jnp.zeros_like(logits[:, :1]), jnp.zeros_like(logits[:1])
        row, column = jax.lax.fori_loop(0, self.iterations, normalize, start)
        return jnp.where(inputs.valid[:, None], logits + row + column, 0.0)


@dataclasses.dataclass(frozen=True)
class Sampled(Rank):
    """Random draws from the softmax of the logits in training, the logits in evaluation.

    Switch (2101.03961, appendix C) calls the draw "sample softmax", Mesh-TensorFlow the policy
    ``sample``. The ``k`` largest sums of logits and Gumbel noise are ``k`` draws without
    replacement.
    """

    def __call__(self, scored: Scored, inputs: Inputs) -> Float[Array, "S E"]:
        """Returns the logits plus noise, or the logits behind the scores without a key."""
        if inputs.rng is None:
            return jax.lax.stop_gradient(scored.noisy)
        logits = jax.lax.stop_gradient(scored.noisy)
        return drawn(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), inputs.rng)


def drawn(logits: Float[Array, "S E"], rng: PRNGKeyArray) -> Float[Array, "S E"]:
    """Returns a ranking ``(S, E)`` that draws from the softmax of ``logits``, by Gumbel noise.

    The logits are taken relative to the best one. They are then small near the best, so that the
    sums keep all digits of the noise.
    """
    logits = logits - logits.max(1, keepdims=True)
    return logits + jax.random.gumbel(rng, logits.shape, logits.dtype)


@dataclasses.dataclass(frozen=True)
class Limit(Ranged):
    """A restriction of each token to the experts of a few groups of neighbours, such as devices.

    Attributes:
        groups: Number of groups, a divisor of ``E``.
        keep: Groups per token.
        by: Score of a group: the best score of its experts (``max``, DeepSeek-V2) or the sum of
            the two best scores (``top2``, DeepSeek-V3).
    """

    groups: Positive
    keep: Positive
    by: Literal["max", "top2"] = "max"

    @property
    def excludes(self) -> bool:
        """True if a token has fewer groups than there are."""
        return self.keep < self.groups

    def check(self, num_experts: int, k: int) -> None:
        """Raises ``ConfigError`` if ``keep`` groups have fewer than ``k`` experts."""
        size, rest = divmod(num_experts, self.groups)
        if rest or self.keep > self.groups or self.keep * size < k:
            raise ConfigError(
                f"limit: {self.keep} of {self.groups} groups of {num_experts} experts cannot hold "
                f"{k} per token: change limit.groups or limit.keep"
            )

    def __call__(
        self, ranking: Float[Array, "S E"], log_scores: Float[Array, "S E"] | None = None
    ) -> Float[Array, "S E"]:
        """Returns the ranking ``(S, E)`` with ``-inf`` outside a token's groups.

        Args:
            ranking: Ranking ``(S, E)`` of the experts.
            log_scores: Logarithms ``(S, E)`` of the scores that give a group its value; ``None``
                computes the value from the ranking.
        """
        tokens, experts = ranking.shape
        inside = (ranking if log_scores is None else log_scores).reshape(tokens, self.groups, -1)
        best_two = jax.lax.top_k(inside, min(2, inside.shape[-1]))[0]
        total = jnp.sum if log_scores is None else jax.nn.logsumexp
        value = best_two[..., 0] if self.by == "max" else total(best_two, axis=-1)
        chosen = jax.lax.top_k(jax.lax.stop_gradient(value), self.keep)[1]
        mask = (chosen[..., None] == jnp.arange(self.groups)).any(1)
        mask = jnp.repeat(mask, experts // self.groups, axis=1)
        return jnp.where(mask, ranking, -jnp.inf)
