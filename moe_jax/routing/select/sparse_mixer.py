"""Sampled experts with an estimate of the gradient of the choice (SparseMixer, GRIN)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from moe_jax.errors import ConfigError
from moe_jax.ranges import Positive, Share
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.select.base import Select, TokenChoice, at, every_choice
from moe_jax.routing.select.rank import drawn


@dataclasses.dataclass(frozen=True)
class SparseMixer(Select):
    """Every token draws ``k`` experts, one after the other, among those close to its best one.

    GRIN (2409.12136, section 2; Phi-3.5-MoE) draws from the softmax over the experts that are not
    yet chosen and whose logit is within ``2 jitter`` of the best one, relative to the larger of
    both. The gate is the probability of the drawn expert. If a draw is not the best expert, the
    gate is a third of it with probability 3/4, while the whole probability is differentiated:
    Heun's third-order estimate of the gradient through the choice. Evaluation takes the best.

    Attributes:
        k: Experts per token.
        jitter: Half of the relative distance to the best logit (``router_jitter_noise``).
    """

    k: Positive = 2
    jitter: Share = 0.01

    def choices(self, num_experts: int) -> int:
        """Returns ``K``."""
        del num_experts
        return self.k

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if there are fewer than ``k`` experts."""
        if self.k > num_experts:
            raise ConfigError(f"k={self.k} experts per token, but there are {num_experts} experts")

    def gate(self) -> str:
        """Returns a description of the combine weight, for the table of routers."""
        return "softmax over the experts close to the best"

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Returns the choices of one group."""
        logits = scored.noisy
        keys = (None,) * self.k if inputs.rng is None else jax.random.split(inputs.rng, self.k)
        left = jnp.ones(logits.shape, bool)
        experts, gates = [], []
        for key in keys:
            expert, gate = one_draw(logits, left, self.jitter, key)
            left &= expert != jnp.arange(logits.shape[1])
            experts.append(expert)
            gates.append(gate)
        return every_choice(jnp.concatenate(experts, 1), jnp.concatenate(gates, 1), inputs.valid)


def one_draw(
    logits: Float[Array, "S E"],
    left: Bool[Array, "S E"],
    jitter: float,
    key: PRNGKeyArray | None,
) -> tuple[Int32[Array, "S 1"], Float[Array, "S 1"]]:
    """Returns the drawn expert ``(S, 1)`` of each token, and its gate.

    Args:
        logits: Logits ``(S, E)``.
        left: Mask ``(S, E)`` of the experts that may be drawn.
        jitter: See ``SparseMixer``.
        key: Random key; ``None`` takes the best expert.
    """
    fixed = jax.lax.stop_gradient(logits)
    top = jnp.where(left, fixed, -jnp.inf).max(1, keepdims=True)
    close = left & ~(top - fixed > 2 * jitter * jnp.maximum(jnp.abs(fixed), top))
    among = jnp.where(close, logits, -jnp.inf)
    best = jnp.argmax(among, axis=1, keepdims=True).astype(jnp.int32)
    if key is None:
        return best, at(jax.nn.softmax(among, axis=1), best)
    draw, half = jax.random.split(key)
    ranking = drawn(jax.lax.stop_gradient(among), draw)
    expert = jnp.argmax(ranking, axis=1, keepdims=True).astype(jnp.int32)
    gate = at(jax.nn.softmax(among, axis=1), expert)
    whole = (expert == best) | (jax.random.uniform(half, best.shape) > 0.75)
    return expert, gate - jax.lax.stop_gradient(jnp.where(whole, 0, 2 / 3) * gate)
