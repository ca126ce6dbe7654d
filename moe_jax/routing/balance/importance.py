"""Losses on the spread of a quantity over experts: the squared coefficient of variation."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.ranges import Weight
from moe_jax.routing.balance.base import Balance, mean_over, per_token, sent, token_choice
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.select import Selection


def squared_variation(per_expert: Float[Array, " E"]) -> Float[Array, ""]:
    """Returns the variance divided by the squared mean of ``(E,)``, and 0 if the mean is 0."""
    mean = per_expert.mean()
    # The values are divided before the variance is taken: the square of a small mean is zero.
    share = per_expert / jnp.where(mean > 0, mean, 1)
    return jnp.where(mean > 0, share.var(), 0)


@dataclasses.dataclass(frozen=True)
class Importance(Balance):
    """The squared coefficient of variation of the summed gates (1701.06538, section 4).

    Attributes:
        weight: Factor ``w_importance`` in the objective.
        of: Summed quantity: the ``gates`` of the chosen experts (Shazeer) or the noiseless
            ``scores`` of all experts (V-MoE).
        name: Name of the logged metric.
    """

    weight: Weight = 0.1
    of: Literal["gates", "scores"] = "gates"
    name: str = "importance"

    needs_token_choice = True

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Float[Array, ""]:
        """Returns the loss of one group, a scalar."""
        if self.of == "scores":
            return squared_variation(mean_over(scored.clean, inputs.valid))
        choice, experts = token_choice(selection), scored.clean.shape[1]
        chosen = choice.expert[..., None] == jnp.arange(experts)
        gates = (choice.gate[..., None] * chosen).sum(1)
        return squared_variation(mean_over(gates, inputs.valid))


@dataclasses.dataclass(frozen=True)
class Load(Balance):
    """The squared coefficient of variation of a smooth load (Shazeer et al. 2017, appendix A).

    A token counts for an expert with the probability that the token chooses the expert after a new
    draw of that expert's noise alone. Without noise the loss counts choices and has no gradient.

    Attributes:
        weight: Factor ``w_load`` in the objective.
        excluding: True compares with the k-th best of the other experts (Shazeer), False with the
            k-th best of all experts (V-MoE).
        name: Name of the logged metric.
    """

    weight: Weight = 0.1
    excluding: bool = True
    name: str = "load"

    needs_token_choice = True

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Float[Array, ""]:
        """Returns the loss of one group, a scalar."""
        choice = token_choice(selection)
        experts, most = scored.noisy.shape[1], choice.expert.shape[1]
        chosen, k = sent(choice, experts, inputs), per_token(choice, inputs)
        if scored.noise_std is None:
            return squared_variation(mean_over(chosen, inputs.valid))
        top = jax.lax.top_k(scored.noisy, min(most + 1, experts))[0]
        threshold = _column(top, k - 1)
        if self.excluding:
            # The (k + 1)-th best, or the last of all experts.
            threshold = jnp.where(chosen > 0, _column(top, k), threshold)
        won = jax.scipy.stats.norm.cdf((inputs.logits - threshold) / (scored.noise_std + 1e-9))
        return squared_variation(mean_over(won, inputs.valid))


def _column(x: Float[Array, "S N"], index: int | Int[Array, ""]) -> Float[Array, "S 1"]:
    """Returns a column of ``x``, or its last column if the index is beyond it."""
    if isinstance(index, int):
        index = min(index, x.shape[1] - 1)
        return x[:, index : index + 1]
    return jnp.take(x, index, axis=1, mode="clip")[:, None]
