"""Losses on logits and scores alone, whoever is chosen."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.ranges import Weight
from moe_jax.routing.balance.base import Balance, mean_over
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.select import Selection

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ZLoss(Balance):
    """Mean squared log-partition of the router (ST-MoE equation 5).

    Attributes:
        weight: ``c_z``.
        padding: ``masked`` takes the mean over valid tokens; ``zeroed`` over all, where padding
            has logits of zero and so adds ``log(E)**2`` (flaxformer).
    """

    weight: Weight = 1e-3
    padding: Literal["masked", "zeroed"] = "masked"
    name: str = "z"

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Array:
        """Returns the loss of one group, a scalar."""
        del scored, selection
        logits, valid = inputs.logits, inputs.valid
        if self.padding == "zeroed":
            logits, valid = jnp.where(valid[:, None], logits, 0), jnp.ones_like(valid)
        return mean_over(jax.nn.logsumexp(logits, axis=-1) ** 2, valid)


@dataclasses.dataclass(frozen=True)
class Entropy(Balance):
    """Mean entropy of the scores, so that few experts suffice (Huang et al. 2024, equation 6)."""

    weight: Weight = 1e-4
    name: str = "entropy"

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Array:
        """Returns the loss of one group in nats, a scalar."""
        del selection
        return mean_over(-(scored.clean * scored.log_clean).sum(-1), inputs.valid)


@dataclasses.dataclass(frozen=True)
class TokenBalance(Balance):
    """Evenness of how much the tokens are wanted by experts that choose (Mesh-TensorFlow).

    Sum over valid tokens of the squared mean score, times their number: 1 if all are wanted
    equally. It needs a softmax over tokens; over experts the mean score is ``1 / E`` anyway.
    """

    weight: Weight = 1e-2
    name: str = "token_balance"

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Array:
        """Returns the loss of one group, a scalar."""
        del selection
        valid = inputs.valid
        return valid.sum() * (scored.clean.mean(1) ** 2 * valid).sum()
