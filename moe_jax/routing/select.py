"""From scores to wishes: which experts each token wants, or which tokens each expert takes."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

Array = jax.Array

_TINY = 1e-9


@dataclasses.dataclass(frozen=True)
class TokenChoice:
    """Tokens chose experts; the capacity rule still has to seat them.

    Attributes:
        expert: ``(S, K)`` int32, best first.
        gate: ``(S, K)`` combine weight if the choice gets a slot.
        wanted: ``(S, K)`` bool, False for padding and for choices a random policy gave up.
        queued: ``(S, K)`` bool, choices that advance their expert's queue, seated or not.
    """

    expert: Array
    gate: Array
    wanted: Array
    queued: Array


@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """Experts chose tokens; every pick is a slot.

    Attributes:
        token: ``(E, C)`` int32.
        gate: ``(E, C)`` combine weight.
        filled: ``(E, C)`` bool, False where fewer tokens than slots were there.
    """

    token: Array
    gate: Array
    filled: Array


Selection = TokenChoice | ExpertChoice


def top_experts(scores: Array, k: int) -> tuple[Array, Array]:
    """Returns the ``k`` best experts of every token: gates and indices, both ``(S, K)``."""
    gates, experts = jax.lax.top_k(scores, k)
    return gates, experts.astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class TopK:
    """Every token takes its ``k`` best experts (Switch: ``k=1``).

    Attributes:
        k: experts per token.
        normalize: divide the k gates by their sum.
    """

    k: int = 1
    normalize: bool = False

    @property
    def choices_per_token(self) -> int:
        """``K``."""
        return self.k

    def __call__(
        self, scores: Array, valid: Array, *, capacity: int, rng: Array | None
    ) -> TokenChoice:
        """Selects on one group: scores ``(S, E)``, valid ``(S,)``."""
        del capacity, rng
        gates, experts = top_experts(scores, self.k)
        if self.normalize:
            gates = gates / (gates.sum(-1, keepdims=True) + _TINY)
        wanted = jnp.broadcast_to(valid[:, None], experts.shape)
        return TokenChoice(experts, gates, wanted, wanted)


@dataclasses.dataclass(frozen=True)
class Top2:
    """The two best experts, where the second one may be given up (GShard, Mesh-TensorFlow).

    Attributes:
        second: ``all`` keeps every second choice, ``none`` keeps none, ``threshold`` keeps it
            where its normalised gate exceeds ``threshold``, ``random`` keeps it with probability
            ``min(1, gate / threshold)``. Without a random key (evaluation) ``random`` keeps all.
        threshold: GShard's Algorithm 1 keeps with probability ``2 * g2``, so 0.5;
            Mesh-TensorFlow and ST-MoE's appendix G use 0.2.
        lost_choices_queue: a given-up second choice still advances its expert's queue, as the
            counter in GShard's Algorithm 1 does. Mesh-TensorFlow's does not.
    """

    second: Literal["all", "none", "threshold", "random"] = "all"
    threshold: float = 0.5
    lost_choices_queue: bool = False

    @property
    def choices_per_token(self) -> int:
        """``K``."""
        return 2

    def __call__(
        self, scores: Array, valid: Array, *, capacity: int, rng: Array | None
    ) -> TokenChoice:
        """Selects on one group: scores ``(S, E)``, valid ``(S,)``."""
        del capacity
        gates, experts = top_experts(scores, 2)
        gates = gates / (gates.sum(-1, keepdims=True) + _TINY)
        keep = jnp.stack([jnp.ones_like(valid), self._keeps_second(gates[:, 1], rng)], axis=1)
        present = jnp.broadcast_to(valid[:, None], experts.shape)
        wanted = present & keep
        return TokenChoice(experts, gates, wanted, present if self.lost_choices_queue else wanted)

    def _keeps_second(self, gate: Array, rng: Array | None) -> Array:
        match self.second:
            case "none":
                return jnp.zeros(gate.shape, bool)
            case "threshold":
                return gate > self.threshold
            case "random" if rng is not None:
                return gate > self.threshold * jax.random.uniform(rng, gate.shape, gate.dtype)
            case _:
                return jnp.ones(gate.shape, bool)


@dataclasses.dataclass(frozen=True)
class TopTokens:
    """Every expert takes its ``C`` best tokens (Expert Choice, Zhou et al. 2022, section 3.2).

    Attributes:
        average: divide a token's gates by the number of experts that took it (Mesh-TensorFlow).
    """

    average: bool = False

    @property
    def choices_per_token(self) -> int:
        """1: a capacity factor of c gives every token c experts on average."""
        return 1

    def __call__(
        self, scores: Array, valid: Array, *, capacity: int, rng: Array | None
    ) -> ExpertChoice:
        """Selects on one group: scores ``(S, E)``, valid ``(S,)``."""
        del rng
        ranked = jnp.where(valid[:, None], scores, -1.0).T
        _, tokens = jax.lax.top_k(jax.lax.stop_gradient(ranked), capacity)
        filled = valid[tokens]
        gates = jnp.take_along_axis(scores.T, tokens, axis=1)
        if self.average:
            takers = jnp.zeros_like(scores[:, 0]).at[tokens.reshape(-1)].add(1)
            gates = gates / takers[tokens]
        return ExpertChoice(tokens.astype(jnp.int32), gates, filled)


Select = TopK | Top2 | TopTokens
