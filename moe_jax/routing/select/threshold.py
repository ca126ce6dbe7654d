"""Selections in which a token takes every expert above a threshold, however many there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array, Float

from moe_jax.errors import ConfigError
from moe_jax.ranges import Chance, Positive
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.part import NOTHING
from moe_jax.routing.select.base import Select, Selection, TokenChoice, at, best, gates
from moe_jax.routing.select.histogram import Edges, counts_above, cut, widening_edges


class AnyNumber:
    """The selection of any number of experts per token, whose mean should be ``k``."""

    k: int

    def choices(self, num_experts: int) -> int:
        """Returns ``K``, here ``E``."""
        return num_experts

    def expected_choices(self, num_experts: int) -> float:
        """Returns the mean number of choices per token, ``k``."""
        del num_experts
        return float(self.k)

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if there are fewer than ``k`` experts."""
        if self.k > num_experts:
            raise ConfigError(f"k={self.k} experts per token, but there are {num_experts} experts")


@dataclasses.dataclass(frozen=True)
class Active(AnyNumber, Select):
    """Every token chooses all experts with a positive score (ReMoE, 2412.14711).

    Attributes:
        k: Mean number of experts per token that a loss such as ``SparsityLoss`` aims at.
    """

    k: Positive = 2

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Returns the choices of one group."""
        return above(scored, jax.lax.stop_gradient(scored.scores), inputs)


@dataclasses.dataclass(frozen=True)
class Threshold(AnyNumber, Select):
    """Every token chooses all experts whose logit exceeds the expert's threshold (2603.11535).

    Expert threshold routing keeps for each expert an average over steps of the value at which the
    expert would cut if it chose its best ``k / E`` of all tokens, as in Expert Choice. A token is
    routed by its own scores alone, in training as in evaluation, so that the router is causal. The
    cut is read from a histogram of the logits around the threshold. Thresholds start at 0.

    Attributes:
        k: Mean number of experts per token.
        decay: Share of the old threshold in the new one.
        edges: Edges of the bins.
    """

    k: Positive = 1
    decay: Chance = 0.99
    edges: Edges = 128

    def state_shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of ``threshold (E,)``."""
        return {"threshold": (num_experts,)}

    def observe(self, scored: Scored, selection: Selection, inputs: Inputs) -> dict[str, Array]:
        """Returns ``logits_above (E, B)``, the tokens above each edge, and their number."""
        del selection
        counts = counts_above(self._margin(scored, inputs), inputs.valid, self._table)
        return {"logits_above": counts, "tokens": inputs.tokens}

    def next_state(
        self,
        state: dict[str, Array],
        demand: Float[Array, "... E"],
        observed: Mapping[str, Array] = NOTHING,
    ) -> dict[str, Array]:
        """Returns the state with the thresholds after a step."""
        tokens = observed["tokens"]
        share = self.k * tokens[..., None] / demand.shape[-1]
        distance = cut(observed["logits_above"], share, tokens, self._table)
        return state | {"threshold": state["threshold"] + (1 - self.decay) * distance}

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Returns the choices of one group."""
        return above(scored, self._margin(scored, inputs), inputs)

    @property
    def _table(self) -> Float[np.ndarray, " B"]:
        return widening_edges(self.edges)

    def _margin(self, scored: Scored, inputs: Inputs) -> Float[Array, "S E"]:
        threshold = inputs.needs_state("threshold", "Threshold", "(E,) zeros at the start")
        return jax.lax.stop_gradient(scored.noisy - threshold)


def above(scored: Scored, margin: Float[Array, "S E"], inputs: Inputs) -> TokenChoice:
    """Returns the choices of all experts with a positive margin ``(S, E)``, largest first."""
    expert = best(margin, margin.shape[1])
    gate, log_gate = gates(scored, expert, normalize=False)
    wanted = inputs.valid[:, None] & (at(margin, expert) > 0)
    return TokenChoice(expert, gate, wanted, wanted, log_gate)
