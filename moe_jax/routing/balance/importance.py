"""Losses on the spread of a quantity over experts: its squared coefficient of variation."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.ranges import Weight
from moe_jax.routing.balance.base import Balance, mean_over, sent
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.select import Selection

Array = jax.Array


def squared_variation(per_expert: Array) -> Array:
    """Returns variance over squared mean of ``(E,)``, 0 if the mean is."""
    mean = per_expert.mean()
    # The mean itself, since the square of a small one is zero.
    share = per_expert / jnp.where(mean > 0, mean, 1)
    return jnp.where(mean > 0, share.var(), 0)


@dataclasses.dataclass(frozen=True)
class Importance(Balance):
    """Spread of the gates summed over tokens (Shazeer et al. 2017, 1701.06538, section 4).

    Attributes:
        weight: ``w_importance``.
        of: the ``gates`` of the chosen experts (Shazeer) or the noiseless ``scores`` of all
            (V-MoE).
    """

    weight: Weight = 0.1
    of: Literal["gates", "scores"] = "gates"
    name: str = "importance"

    needs_token_choice = True

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Array:
        """Returns the loss of one group, a scalar."""
        if self.of == "scores":
            return squared_variation(mean_over(scored.clean, inputs.valid))
        experts = scored.clean.shape[1]
        chosen = selection.expert[..., None] == jnp.arange(experts)
        gates = (selection.gate[..., None] * chosen).sum(1)
        return squared_variation(mean_over(gates, inputs.valid))


@dataclasses.dataclass(frozen=True)
class Load(Balance):
    """Spread of the smooth number of tokens per expert (Shazeer et al. 2017, appendix A).

    A token counts for an expert with the probability that a new draw of that expert's noise alone
    would have it chosen. Without noise it counts the choices, which has no gradient.

    Attributes:
        weight: ``w_load``.
        excluding: the threshold is the k-th best of the other experts (Shazeer), else the k-th
            best of all (V-MoE).
    """

    weight: Weight = 0.1
    excluding: bool = True
    name: str = "load"

    needs_token_choice = True

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Array:
        """Returns the loss of one group, a scalar."""
        experts, k = scored.noisy.shape[1], selection.expert.shape[1]
        chosen = sent(selection, experts, inputs.valid)
        if scored.noise_std is None:
            return squared_variation(mean_over(chosen, inputs.valid))
        top = jax.lax.top_k(scored.noisy, min(k + 1, experts))[0]
        threshold = top[:, k - 1 : k]
        if self.excluding:
            threshold = jnp.where(chosen > 0, top[:, -1:], threshold)
        won = jax.scipy.stats.norm.cdf((inputs.logits - threshold) / (scored.noise_std + 1e-9))
        return squared_variation(mean_over(won, inputs.valid))
