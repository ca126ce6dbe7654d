"""Selections in which tokens choose experts by score."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from moe_jax.errors import ConfigError
from moe_jax.ranges import Factor, Natural, Positive, PositiveShare, Share
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.part import NOTHING
from moe_jax.routing.select.base import (
    Select,
    Selection,
    TokenChoice,
    at,
    best,
    every_choice,
    gate_in_words,
    gates,
)
from moe_jax.routing.select.rank import Limit, Rank, drawn


@dataclasses.dataclass(frozen=True)
class TopK(Select):
    """Every token chooses its ``k`` best experts (Switch: ``k=1``).

    Attributes:
        k: Experts per token.
        normalize: True divides the ``k`` gates by their sum.
        scale: Factor on every gate (DeepSeek's ``routed_scaling_factor``).
        rank: Values by which a token ranks the experts; ``None`` ranks them by score.
        limit: Restriction to a few groups of experts, or ``None``.
        expert_scale: True multiplies each gate by the scale of its expert, which the head returns
            as the second plane of the logits (Gemma 4).
        skip: Number of its best experts that a token may not choose (DeepSeekMoE, 2401.06066,
            figure 4). It measures on a trained model how well other experts replace them.
    """

    k: Positive = 1
    normalize: bool = False
    scale: Factor = 1.0
    rank: Rank | None = None
    limit: Limit | None = None
    expert_scale: bool = False
    skip: Natural = 0

    def planes(self) -> int:
        """Returns the number of logits per token and expert."""
        return 2 if self.expert_scale else 1

    def choices(self, num_experts: int) -> int:
        """Returns ``K``."""
        del num_experts
        return self.k

    def neighbour_groups(self) -> int:
        """Returns the number of groups of ``limit``, or 1 if a token may choose any expert."""
        return self.limit.groups if self.limit is not None and self.limit.excludes else 1

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if there are fewer than ``k`` experts."""
        if self.k > num_experts:
            raise ConfigError(f"k={self.k} experts per token, but there are {num_experts} experts")
        if self.k + self.skip > num_experts:
            raise ConfigError(
                f"skip={self.skip} leaves fewer than k={self.k} of {num_experts} experts: the "
                f"largest skip is {num_experts - self.k}"
            )
        if self.limit is not None:
            self.limit.check(num_experts, self.k + self.skip)
        if self.rank is not None:
            self.rank.check(num_experts)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ``ConfigError`` if the ranking cannot route all ids below ``vocab_size``."""
        if self.rank is not None:
            self.rank.check_vocabulary(vocab_size)

    def state_shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the ranking's state."""
        return {} if self.rank is None else self.rank.state_shapes(num_experts)

    def next_state(
        self,
        state: dict[str, Array],
        demand: Float[Array, "... E"],
        observed: Mapping[str, Array] = NOTHING,
    ) -> dict[str, Array]:
        """Returns the ranking's state after a step."""
        return state if self.rank is None else self.rank.next_state(state, demand, observed)

    def observe(self, scored: Scored, selection: Selection, inputs: Inputs) -> dict[str, Array]:
        """Returns the sums that the ranking's next state reads."""
        return {} if self.rank is None else self.rank.observe(scored, self.k, inputs)

    def gate(self) -> str:
        """Returns a description of the combine weight, for the table of routers."""
        gate = gate_in_words(self.normalize, self.scale)
        return f"scale of the expert * {gate}" if self.expert_scale else gate

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Returns the choices of one group."""
        if self.rank is None:
            ranking, summed = scored.noisy, scored.log_scores
        else:
            ranking, summed = self.rank(scored, inputs), None
        ranking = ranking if self.limit is None else self.limit(ranking, summed)
        expert = best(ranking, self.k + self.skip)[:, self.skip :]
        kept = inputs.kept(self.k)
        gate, log_gate = gates(scored, expert, normalize=self.normalize, kept=kept)
        if self.expert_scale:
            factor = at(inputs.planes[..., 1], expert)
            gate = gate * factor
            log_gate += jnp.log(jnp.maximum(jnp.abs(factor), jnp.finfo(gate.dtype).tiny))
        return every_choice(expert, gate * self.scale, inputs.valid, log_gate, kept)


@dataclasses.dataclass(frozen=True)
class Top2(Select):
    """Every token chooses its two best experts, and may cancel the second (GShard).

    Attributes:
        second: Policy for second choices. ``all`` keeps every one, ``none`` keeps none,
            ``threshold`` keeps a choice whose gate exceeds ``threshold``, ``random`` keeps a choice
            with probability ``min(1, gate / threshold)``, ``sampling`` draws the second expert by
            Gumbel noise on the logits (fairseq). In evaluation (without a key) the last two keep
            the second best expert.
        threshold: Threshold of the gate. GShard's Algorithm 1 keeps a choice with probability
            ``2 * g2``, a threshold of 0.5; Mesh-TensorFlow and ST-MoE's appendix G use 0.2.
        lost_choices_queue: True if a cancelled second choice still occupies a position in its
            expert's queue, as in GShard's Algorithm 1; False as in Mesh-TensorFlow.
        normalize: True divides both gates by their sum, cancelled and dropped choices included.
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
        """Raises ``ConfigError`` if there is only one expert."""
        if num_experts < 2:
            raise ConfigError(f"Top2 needs 2 experts, but there are {num_experts}")

    def gate(self) -> str:
        """Returns a description of the combine weight, for the table of routers."""
        return gate_in_words(self.normalize)

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Returns the choices of one group."""
        expert = self._experts(scored, inputs.rng)
        gate, log_gate = gates(scored, expert, normalize=self.normalize)
        present = jnp.broadcast_to(inputs.valid[:, None], expert.shape)
        keep = self._keeps_second(gate[:, 1], inputs.rng)
        wanted = present & jnp.stack([jnp.ones_like(keep), keep], axis=1)
        queued = present if self.lost_choices_queue else wanted
        return TokenChoice(expert, gate, wanted, queued, log_gate)

    def _experts(self, scored: Scored, rng: PRNGKeyArray | None) -> Int32[Array, "S 2"]:
        if self.second != "sampling" or rng is None:
            return best(scored.noisy, 2)
        first = best(scored.noisy, 1)
        others = first != jnp.arange(scored.noisy.shape[1])
        second = best(drawn(jnp.where(others, scored.noisy, -jnp.inf), rng), 1)
        return jnp.concatenate([first, second], axis=1)

    def _keeps_second(
        self, gate: Float[Array, " S"], rng: PRNGKeyArray | None
    ) -> Bool[Array, " S"]:
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
    """Every token chooses its best experts up to probability ``p`` (Huang et al. 2024, 2403.07652).

    Attributes:
        p: Smallest sum of a token's gates.
        k_max: Largest number of experts per token, even if their gates sum to less than ``p``.
    """

    p: PositiveShare = 0.4
    k_max: Positive = 4

    def choices(self, num_experts: int) -> int:
        """Returns ``K``."""
        return min(self.k_max, num_experts)

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Returns the choices of one group."""
        expert = best(scored.noisy, self.choices(scored.noisy.shape[1]))
        gate, log_gate = gates(scored, expert, normalize=False)
        before = jnp.cumsum(gate, axis=1) - gate
        wanted = inputs.valid[:, None] & (before < self.p)
        return TokenChoice(expert, gate, wanted, wanted, log_gate)


@dataclasses.dataclass(frozen=True)
class TopGroups(Select):
    """Every token chooses groups of experts, then experts in each (Shazeer 2017, appendix B).

    The score of a group is the sum of the scores of its experts. Gates are normalised over the
    chosen groups, and within each group over its chosen experts.

    Attributes:
        groups: Number of groups, a divisor of ``E``.
        k_groups: Groups per token.
        k: Experts per token in each group.
    """

    groups: Positive = 4
    k_groups: Positive = 2
    k: Positive = 2

    def choices(self, num_experts: int) -> int:
        """Returns ``K``."""
        del num_experts
        return self.k_groups * self.k

    def neighbour_groups(self) -> int:
        """Returns the number of groups, of which a token chooses some."""
        return self.groups

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if the chosen groups have too few experts."""
        Limit(self.groups, self.k_groups).check(num_experts, self.k_groups * self.k)

    def gate(self) -> str:
        """Returns a description of the combine weight, for the table of routers."""
        return "group / sum over the chosen * score in it / sum over the chosen"

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Returns the choices of one group."""
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
    """Every token chooses every expert (Jacobs, Jordan, Nowlan & Hinton 1991)."""

    def choices(self, num_experts: int) -> int:
        """Returns ``K``."""
        return num_experts

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Returns the choices of one group."""
        expert = jnp.broadcast_to(
            jnp.arange(scored.scores.shape[1], dtype=jnp.int32), scored.scores.shape
        )
        return every_choice(expert, scored.scores, inputs.valid, scored.log_scores)
