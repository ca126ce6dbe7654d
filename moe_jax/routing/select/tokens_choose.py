"""Tokens choose experts by score."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.errors import ConfigError
from moe_jax.ranges import Factor, Positive, PositiveShare, Share
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.select.base import (
    Select,
    TokenChoice,
    at,
    best,
    every_choice,
    gate_in_words,
    gates,
)
from moe_jax.routing.select.rank import Limit, Rank, drawn

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TopK(Select):
    """Every token takes its ``k`` best experts (Switch: ``k=1``).

    Attributes:
        k: experts per token.
        normalize: divide the k gates by their sum.
        scale: factor on every gate (DeepSeek's ``routed_scaling_factor``).
        rank: what experts are ranked by; ``None`` is the score itself.
        limit: the groups of experts a token may choose from.
    """

    k: Positive = 1
    normalize: bool = False
    scale: Factor = 1.0
    rank: Rank | None = None
    limit: Limit | None = None

    def choices(self, num_experts: int) -> int:
        """Returns ``K``."""
        del num_experts
        return self.k

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if there are fewer than ``k`` experts."""
        if self.k > num_experts:
            raise ConfigError(f"k={self.k} experts per token, but there are {num_experts} experts")
        if self.limit is not None:
            self.limit.check(num_experts, self.k)

    def state_shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the rank's state."""
        return {} if self.rank is None else self.rank.state_shapes(num_experts)

    def next_state(self, state: dict[str, Array], demand: Array) -> dict[str, Array]:
        """Returns the rank's state after a step."""
        return state if self.rank is None else self.rank.next_state(state, demand)

    def gate(self) -> str:
        """Returns in words what the combine weight of a choice is."""
        return gate_in_words(self.normalize, self.scale)

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Selects on one group."""
        if self.rank is None:
            ranking, summed = scored.noisy, scored.log_scores
        else:
            ranking, summed = self.rank(scored, inputs), None
        ranking = ranking if self.limit is None else self.limit(ranking, summed)
        expert = best(ranking, self.k)
        gate, log_gate = gates(scored, expert, normalize=self.normalize)
        return every_choice(expert, gate * self.scale, inputs.valid, log_gate)


@dataclasses.dataclass(frozen=True)
class Top2(Select):
    """The two best experts, where the second one may be given up (GShard, Mesh-TensorFlow).

    Attributes:
        second: ``all`` keeps every second choice, ``none`` keeps none, ``threshold`` keeps it
            where its gate exceeds ``threshold``, ``random`` keeps it with probability
            ``min(1, gate / threshold)``, ``sampling`` draws it by Gumbel noise on the logits
            (fairseq). Without a random key (evaluation) the last two keep the second best.
        threshold: GShard's Algorithm 1 keeps with probability ``2 * g2``, so 0.5;
            Mesh-TensorFlow and ST-MoE's appendix G use 0.2.
        lost_choices_queue: a given-up second choice still advances its expert's queue, as the
            counter in GShard's Algorithm 1 does. Mesh-TensorFlow's does not.
        normalize: divide both gates by their sum, before any is given up or dropped.
    """

    second: Literal["all", "none", "threshold", "random", "sampling"] = "all"
    threshold: Share = 0.5
    lost_choices_queue: bool = False
    normalize: bool = True

    def choices(self, num_experts: int) -> int:
        """Returns ``K``."""
        del num_experts
        return 2

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if there is no second expert."""
        if num_experts < 2:
            raise ConfigError(f"Top2 needs 2 experts, but there are {num_experts}")

    def gate(self) -> str:
        """Returns in words what the combine weight of a choice is."""
        return gate_in_words(self.normalize)

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Selects on one group."""
        expert = self._experts(scored, inputs.rng)
        gate, log_gate = gates(scored, expert, normalize=self.normalize)
        present = jnp.broadcast_to(inputs.valid[:, None], expert.shape)
        keep = self._keeps_second(gate[:, 1], inputs.rng)
        wanted = present & jnp.stack([jnp.ones_like(keep), keep], axis=1)
        queued = present if self.lost_choices_queue else wanted
        return TokenChoice(expert, gate, wanted, queued, log_gate)

    def _experts(self, scored: Scored, rng: Array | None) -> Array:
        if self.second != "sampling" or rng is None:
            return best(scored.noisy, 2)
        first = best(scored.noisy, 1)
        others = first != jnp.arange(scored.noisy.shape[1])
        second = best(drawn(jnp.where(others, scored.noisy, -jnp.inf), rng), 1)
        return jnp.concatenate([first, second], axis=1)

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
class TopP(Select):
    """As many experts as it takes to reach probability ``p`` (Huang et al. 2024, 2403.07652).

    Attributes:
        p: the least sum of the gates.
        k_max: the most experts a token takes.
    """

    p: PositiveShare = 0.4
    k_max: Positive = 4

    def choices(self, num_experts: int) -> int:
        """Returns ``K``."""
        return min(self.k_max, num_experts)

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Selects on one group."""
        expert = best(scored.noisy, self.choices(scored.noisy.shape[1]))
        gate, log_gate = gates(scored, expert, normalize=False)
        before = jnp.cumsum(gate, axis=1) - gate
        wanted = inputs.valid[:, None] & (before < self.p)
        return TokenChoice(expert, gate, wanted, wanted, log_gate)


@dataclasses.dataclass(frozen=True)
class TopGroups(Select):
    """The best groups of experts, then the best experts in each (Shazeer 2017, appendix B).

    The score of a group is the sum of its experts'. Gates are normalised over the chosen groups,
    and within each over its chosen experts.

    Attributes:
        groups: their number; it divides ``E``.
        k_groups: groups per token.
        k: experts per token in each.
    """

    groups: Positive = 4
    k_groups: Positive = 2
    k: Positive = 2

    def choices(self, num_experts: int) -> int:
        """Returns ``K``."""
        del num_experts
        return self.k_groups * self.k

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if the groups do not fit."""
        Limit(self.groups, self.k_groups).check(num_experts, self.k_groups * self.k)

    def gate(self) -> str:
        """Returns in words what the combine weight of a choice is."""
        return "group / sum over the chosen * score in it / sum over the chosen"

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Selects on one group."""
        tokens, experts = scored.scores.shape
        size = experts // self.groups
        inside = scored.log_scores.reshape(tokens, self.groups, size)
        primary = jax.nn.logsumexp(inside, axis=-1)
        group = best(primary, self.k_groups)
        chosen = jnp.take_along_axis(inside, group[..., None], axis=1)
        order = jax.lax.top_k(jax.lax.stop_gradient(chosen), self.k)[1]
        secondary = jax.nn.log_softmax(jnp.take_along_axis(chosen, order, axis=2), axis=-1)
        among = jax.nn.log_softmax(at(primary, group), axis=-1)
        log_gate = (among[..., None] + secondary).reshape(tokens, -1)
        expert = (group[..., None] * size + order).astype(jnp.int32).reshape(tokens, -1)
        return every_choice(expert, jnp.exp(log_gate), inputs.valid, log_gate)


@dataclasses.dataclass(frozen=True)
class Everyone(Select):
    """Every token goes to every expert (Jacobs, Jordan, Nowlan & Hinton 1991)."""

    def choices(self, num_experts: int) -> int:
        """Returns ``K``."""
        return num_experts

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Selects on one group."""
        expert = jnp.broadcast_to(
            jnp.arange(scored.scores.shape[1], dtype=jnp.int32), scored.scores.shape
        )
        return every_choice(expert, scored.scores, inputs.valid, scored.log_scores)
