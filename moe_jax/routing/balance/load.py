"""Losses on who is sent where, by fraction of tokens times mean score."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.precision import wide_einsum
from moe_jax.ranges import Chance, Positive, Weight
from moe_jax.routing.balance.base import (
    Balance,
    by_device,
    check_devices,
    mean_over,
    sent,
)
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.select import Selection

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LoadBalance(Balance):
    """Fraction of tokens sent times mean score, summed over experts, times ``E``.

    Switch equations 4-6: 1 where the routing is uniform. GShard's ``l_aux`` is this over ``E**2``.

    Attributes:
        weight: factor in the objective (Switch: 1e-2).
        choices: the fraction counts ``first`` choices (Switch, GShard, Mesh-TensorFlow), ``all``
            of them (flaxformer, transformers; balanced value ``K``) or their ``mean`` (DeepSeek).
            Wishes count, before any is dropped.
        padding: ``masked`` leaves padding out of both factors and of their means (praxis);
            ``diluted`` out of both factors, but divides them by ``S`` (Mesh-TensorFlow's top-2);
            ``counted`` routes padding like any token and multiplies the loss by the share of
            valid tokens (Mesh-TensorFlow's Switch); ``unsent`` leaves it out of the fraction
            alone and divides both by ``S`` (fairseq).
        per_token: divide a token's scores by their sum first (DeepSeek-V3 equation 18).
        ema: the fraction is an average over steps that keeps this share of the past, as it was
            before the step; 0 takes the group's own.
        span: the loss is that of each ``group`` (GShard) or of each ``sequence`` (DeepSeek).
    """

    weight: Weight = 1e-2
    choices: Literal["first", "all", "mean"] = "first"
    padding: Literal["masked", "diluted", "counted", "unsent"] = "masked"
    per_token: bool = False
    ema: Chance = 0.0
    name: str = "balance"
    span: Literal["group", "sequence"] = "group"

    needs_token_choice = True

    def state_shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Returns ``load_ema (E,)`` if the fraction is an average over steps."""
        return {"load_ema": (num_experts,)} if self.ema else {}

    def next_state(self, state: dict[str, Array], demand: Array) -> dict[str, Array]:
        """Returns the average after a step."""
        if not self.ema:
            return state
        share = demand / jnp.maximum(demand.sum(-1, keepdims=True), 1)
        return state | {"load_ema": self.ema * state["load_ema"] + (1 - self.ema) * share}

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Array:
        """Returns the loss of one group, a scalar."""
        scores, valid = scored.clean, inputs.valid
        if self.per_token:
            scores = jax.nn.softmax(scored.log_clean, axis=-1)
        num_tokens, num_experts = scores.shape
        everyone = jnp.ones_like(valid)
        mask_sent = everyone if self.padding == "counted" else valid
        mask_proxy = everyone if self.padding in ("counted", "unsent") else valid
        tokens = jnp.maximum(valid.sum(), 1) if self.padding == "masked" else num_tokens
        chosen = sent(selection, num_experts, valid, 1 if self.choices == "first" else None)
        chosen = chosen / (selection.expert.shape[1] if self.choices == "mean" else 1)
        fraction = jnp.where(mask_sent[:, None], chosen, 0).sum(0) / tokens
        if self.ema:
            fraction = inputs.needs_state("load_ema", "LoadBalance(ema)", "(E,) zeros at first")
        proxy = jnp.where(mask_proxy[:, None], scores, 0).sum(0) / tokens
        loss = num_experts * wide_einsum("e,e->", jax.lax.stop_gradient(fraction), proxy)
        return loss * valid.mean(dtype=loss.dtype) if self.padding == "counted" else loss


@dataclasses.dataclass(frozen=True)
class SecondBalance(Balance):
    """The balance of second choices among the experts that are not first (Mesh-TensorFlow).

    Mesh-TensorFlow adds it at half the weight of the first and found it "a wash". Its padding makes
    no second choice, but counts in the proxy (where it has no first one to leave out) and in both
    divisors.
    """

    weight: Weight = 5e-3
    name: str = "second_balance"

    needs_token_choice = True
    needs_second_choice = True

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Array:
        """Returns the loss of one group, a scalar."""
        num_experts = scored.clean.shape[1]
        one_hot = jax.nn.one_hot(selection.expert, num_experts, dtype=scored.clean.dtype)
        one_hot *= inputs.valid[:, None, None]
        least = jnp.finfo(scored.clean.dtype).min
        rest = jnp.where(one_hot[:, 0] > 0, least, scored.log_clean)
        proxy = jax.nn.softmax(rest, axis=-1).mean(0)
        fraction = one_hot[:, 1].mean(0)
        return num_experts * wide_einsum("e,e->", jax.lax.stop_gradient(fraction), proxy)


@dataclasses.dataclass(frozen=True)
class DeviceBalance(Balance):
    """Evenness of computation over devices (DeepSeekMoE equations 15-17; DeepSeek-V2 26-28).

    Mean fraction of a device's experts times the sum of their mean scores: 1 where both are even.

    Attributes:
        weight: ``alpha_2``.
        devices: groups of neighbouring experts.
        span: see ``LoadBalance``.
    """

    weight: Weight = 0.05
    devices: Positive = 8
    name: str = "device_balance"
    span: Literal["group", "sequence"] = "group"

    needs_token_choice = True

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if the devices do not divide the experts."""
        check_devices(num_experts, self.devices, "DeviceBalance")

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Array:
        """Returns the loss of one group, a scalar."""
        experts, k = scored.clean.shape[1], selection.expert.shape[1]
        fraction = mean_over(sent(selection, experts, inputs.valid), inputs.valid) * experts / k
        fraction = by_device(fraction, self.devices) * self.devices / experts
        proxy = by_device(mean_over(scored.clean, inputs.valid), self.devices)
        return wide_einsum("e,e->", jax.lax.stop_gradient(fraction), proxy)


@dataclasses.dataclass(frozen=True)
class CommunicationBalance(Balance):
    """Evenness of what devices receive (DeepSeek-V2, 2405.04434, equations 29-31).

    Attributes:
        weight: ``alpha_3``.
        devices: ``D``, groups of neighbouring experts.
        keep: ``M``, devices per token.
        span: see ``LoadBalance``.
    """

    weight: Weight = 0.02
    devices: Positive = 8
    keep: Positive = 3
    name: str = "communication_balance"
    span: Literal["group", "sequence"] = "group"

    needs_token_choice = True

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if the devices do not divide the experts."""
        check_devices(num_experts, self.devices, "CommunicationBalance")

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Array:
        """Returns the loss of one group, a scalar."""
        visits = by_device(sent(selection, scored.clean.shape[1], inputs.valid), self.devices) > 0
        visits = visits.astype(scored.clean.dtype)
        fraction = mean_over(visits, inputs.valid) * self.devices / self.keep
        proxy = by_device(mean_over(scored.clean, inputs.valid), self.devices)
        return wide_einsum("e,e->", jax.lax.stop_gradient(fraction), proxy)
