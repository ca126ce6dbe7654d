"""The loss that keeps the number of experts per token at a target (ReMoE)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.precision import wide_einsum
from moe_jax.ranges import Growth, Positive, Weight
from moe_jax.routing.balance.base import Balance, mean_over, sent, token_choice
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.part import NOTHING
from moe_jax.routing.select import Selection


@dataclasses.dataclass(frozen=True)
class SparsityLoss(Balance):
    """The mean sum of a token's scores, weighted by the load, with a weight that adapts (ReMoE).

    ReMoE (2412.14711, section 3.4) multiplies the score of an expert by its load relative to an
    even load of ``k`` experts per token. The weight of the loss grows by the factor ``growth`` in
    each step in which tokens choose more than ``k`` experts on average, and shrinks by it if they
    choose fewer. Each layer has a weight of its own; the paper has one for all layers.

    Attributes:
        weight: Factor in the objective at the start, ``lambda_0``.
        k: Target of the mean number of experts per token.
        growth: Factor ``alpha`` of the weight per step.
        name: Name of the logged metric, which includes the growth of the weight.
    """

    weight: Weight = 1e-8
    k: Positive = 2
    growth: Growth = 1.2
    name: str = "sparsity"

    needs_token_choice = True

    def state_shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of ``sparsity_steps (1,)``, the logarithm of the weight's growth."""
        del num_experts
        return {"sparsity_steps": (1,)}

    def observe(self, scored: Scored, selection: Selection, inputs: Inputs) -> dict[str, Array]:
        """Returns the number of ``tokens``."""
        del scored, selection
        return {"tokens": inputs.tokens}

    def next_state(
        self,
        state: dict[str, Array],
        demand: Float[Array, "... E"],
        observed: Mapping[str, Array] = NOTHING,
    ) -> dict[str, Array]:
        """Returns the state with one step of growth more or less."""
        excess = demand.sum(-1, keepdims=True) - self.k * observed["tokens"][..., None]
        return state | {"sparsity_steps": state["sparsity_steps"] + jnp.sign(excess)}

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Float[Array, ""]:
        """Returns the loss of one group, a scalar."""
        steps = inputs.needs_state("sparsity_steps", "SparsityLoss", "(1,) zeros at the start")
        experts = scored.clean.shape[1]
        chosen = mean_over(sent(token_choice(selection), experts, inputs), inputs.valid)
        load = jax.lax.stop_gradient(chosen * experts / self.k)
        loss = wide_einsum("e,e->", load, mean_over(scored.clean, inputs.valid))
        return self.growth ** steps[0] * loss
