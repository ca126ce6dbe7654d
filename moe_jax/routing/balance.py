"""Losses that keep the load even and the logits small. Each is unweighted and for one group."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.errors import ConfigError
from moe_jax.routing.select import ExpertChoice, Selection

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LoadBalance:
    """Fraction of tokens sent times mean score, summed over experts, times ``E``.

    Switch equations 4-6: 1 where the routing is uniform. GShard's ``l_aux`` is this over ``E**2``.

    Attributes:
        weight: factor in the objective (Switch: 1e-2).
        choices: the fraction counts ``first`` choices (Switch, GShard, Mesh-TensorFlow) or ``all``
            of them (flaxformer; balanced value ``K``). Wishes count, before any is dropped.
        padding: ``masked`` leaves padding out of both factors and of their means (praxis);
            ``diluted`` out of both factors, but divides them by ``S`` (Mesh-TensorFlow's top-2);
            ``counted`` routes padding like any token and multiplies the loss by the share of
            valid tokens (Mesh-TensorFlow's Switch).
    """

    weight: float = 1e-2
    choices: Literal["first", "all"] = "first"
    padding: Literal["masked", "diluted", "counted"] = "masked"
    name: str = "balance"

    def __call__(self, logits: Array, scores: Array, selection: Selection, valid: Array) -> Array:
        """Returns the loss of one group, a scalar.

        Raises:
            ConfigError: if the experts chose; their load is even by construction.
        """
        del logits
        if isinstance(selection, ExpertChoice):
            raise ConfigError(
                "LoadBalance needs tokens that choose experts; with TopTokens (expert choice) the "
                "load is even by construction: remove it from the router's balance"
            )
        num_tokens, num_experts = scores.shape
        expert = selection.expert[:, :1] if self.choices == "first" else selection.expert
        sent = (expert[..., None] == jnp.arange(num_experts)).sum(1).astype(scores.dtype)
        mask = jnp.ones_like(valid) if self.padding == "counted" else valid
        tokens = jnp.maximum(valid.sum(), 1) if self.padding == "masked" else num_tokens
        fraction = jnp.where(mask[:, None], sent, 0).sum(0) / tokens
        proxy = jnp.where(mask[:, None], scores, 0).sum(0) / tokens
        loss = num_experts * jnp.dot(jax.lax.stop_gradient(fraction), proxy)
        return loss * valid.mean(dtype=loss.dtype) if self.padding == "counted" else loss


@dataclasses.dataclass(frozen=True)
class SecondBalance:
    """The balance of second choices among the experts that are not first (Mesh-TensorFlow).

    Mesh-TensorFlow adds it at half the weight of the first and found it "a wash". Its padding makes
    no second choice, but counts in the proxy (where it has no first one to leave out) and in both
    divisors.
    """

    weight: float = 5e-3
    name: str = "second_balance"

    def __call__(self, logits: Array, scores: Array, selection: Selection, valid: Array) -> Array:
        """Returns the loss of one group, a scalar."""
        del logits
        num_experts = scores.shape[1]
        one_hot = jax.nn.one_hot(selection.expert, num_experts, dtype=scores.dtype)
        one_hot *= valid[:, None, None]
        rest = scores * (1 - one_hot[:, 0])
        proxy = (rest / (rest.sum(-1, keepdims=True) + 1e-9)).mean(0)
        fraction = one_hot[:, 1].mean(0)
        return num_experts * jnp.dot(jax.lax.stop_gradient(fraction), proxy)


@dataclasses.dataclass(frozen=True)
class TokenBalance:
    """Evenness of how much the tokens are wanted by experts that choose (Mesh-TensorFlow).

    Sum over valid tokens of the squared mean score, times their number: 1 if all are wanted
    equally. It needs a softmax over tokens; over experts the mean score is ``1 / E`` anyway.
    """

    weight: float = 1e-2
    name: str = "token_balance"

    def __call__(self, logits: Array, scores: Array, selection: Selection, valid: Array) -> Array:
        """Returns the loss of one group, a scalar."""
        del logits, selection
        return valid.sum() * (scores.mean(1) ** 2 * valid).sum()


@dataclasses.dataclass(frozen=True)
class ZLoss:
    """Mean squared log-partition of the router (ST-MoE equation 5), over valid tokens."""

    weight: float = 1e-3
    name: str = "z"

    def __call__(self, logits: Array, scores: Array, selection: Selection, valid: Array) -> Array:
        """Returns the loss of one group, a scalar."""
        del scores, selection
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return (log_z**2 * valid).sum() / jnp.maximum(valid.sum(), 1)


Balance = LoadBalance | SecondBalance | TokenBalance | ZLoss
