"""Losses on logits and scores alone, independent of the choices."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.ranges import Weight
from moe_jax.routing.balance.base import Balance, mean_over
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.select import Selection


@dataclasses.dataclass(frozen=True)
class ZLoss(Balance):
    """The mean squared log-partition function of the logits (ST-MoE, 2202.08906, equation 5).

    Attributes:
        weight: Factor ``c_z`` in the objective.
        padding: Treatment of padding. ``masked`` takes the mean over valid tokens; ``zeroed`` takes
            it over all tokens and sets the logits of padding to zero, so that each padded token
            adds ``log(E)**2`` (flaxformer).
        name: Name of the logged metric.
    """

    weight: Weight = 1e-3
    padding: Literal["masked", "zeroed"] = "masked"
    name: str = "z"
    balances = False

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Float[Array, ""]:
        """Returns the loss of one group, a scalar."""
        del scored, selection
        logits, valid = inputs.logits, inputs.valid
        if self.padding == "zeroed":
            logits, valid = jnp.where(valid[:, None], logits, 0), jnp.ones_like(valid)
        return mean_over(jax.nn.logsumexp(logits, axis=-1) ** 2, valid)


@dataclasses.dataclass(frozen=True)
class Entropy(Balance):
    """The mean entropy of a token's scores (Huang et al. 2024, 2403.07652, equation 6).

    A low entropy lets ``TopP`` reach its probability with few experts.

    Attributes:
        weight: Factor in the objective.
        name: Name of the logged metric.
    """

    weight: Weight = 1e-4
    name: str = "entropy"
    balances = False

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Float[Array, ""]:
        """Returns the loss of one group in nats, a scalar."""
        del selection
        return mean_over(-(scored.clean * scored.log_clean).sum(-1), inputs.valid)


@dataclasses.dataclass(frozen=True)
class TokenBalance(Balance):
    """The balance of scores over the tokens, for experts that choose tokens (Mesh-TensorFlow).

    The loss is the number of valid tokens times the sum over them of the squared mean score: 1 if
    all tokens have equal mean scores. It needs a softmax over tokens, because a softmax over
    experts gives every token the mean score ``1 / E``.

    Attributes:
        weight: Factor in the objective.
        name: Name of the logged metric.
    """

    weight: Weight = 1e-2
    name: str = "token_balance"
    balances = False

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Float[Array, ""]:
        """Returns the loss of one group, a scalar."""
        del selection
        valid = inputs.valid
        return valid.sum() * (scored.clean.mean(1) ** 2 * valid).sum()
