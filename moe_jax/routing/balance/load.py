"""Losses on the load: the fraction of tokens that chose an expert times the mean score of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.errors import ConfigError
from moe_jax.precision import wide_einsum
from moe_jax.ranges import Chance, Natural, Positive, Share, Weight
from moe_jax.routing.balance.base import (
    BATCH_LOAD,
    Balance,
    by_device,
    check_devices,
    mean_over,
    per_token,
    sent,
    token_choice,
)
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.part import NOTHING
from moe_jax.routing.select import Selection


@dataclasses.dataclass(frozen=True)
class LoadBalance(Balance):
    """The fraction of tokens per expert times the mean score, summed over experts, times ``E``.

    The loss is 1 for a uniform routing (Switch, 2101.03961, equations 4-6). GShard's ``l_aux`` is
    this loss divided by ``E**2``.

    Attributes:
        weight: Factor in the objective (Switch: 1e-2).
        choices: Choices that the fraction counts: ``first`` choices (Switch, GShard,
            Mesh-TensorFlow), the sum over ``all`` choices (flaxformer, transformers; a uniform
            routing has loss ``K``) or the ``mean`` over all choices (DeepSeek). Dropped choices
            count too.
        padding: Treatment of padding. ``masked`` excludes it from both factors and from their
            denominators (praxis); ``diluted`` excludes it from both factors, and divides them by
            ``S`` (Mesh-TensorFlow's top-2); ``counted`` routes padding like any token and
            multiplies the loss by the share of valid tokens (Mesh-TensorFlow's Switch);
            ``unsent`` excludes it from the fraction only, and divides both factors by ``S``
            (fairseq).
        per_token: True first divides the scores of a token by their sum (DeepSeek-V3, 2412.19437,
            equation 18).
        ema: Decay of an average of the fraction over steps, which replaces the fraction of the
            group; the average excludes the current step. 0 selects the fraction of the group.
        name: Name of the logged metric.
        span: Tokens over which one loss is computed: a ``group`` (GShard) or a ``sequence``
            (DeepSeek).
        over: Tokens of the fraction: those of the ``span``, or the whole ``batch`` over all
            devices and microbatches (Qiu et al. 2025, 2501.11873; Qwen3). Several microbatches
            then cost a second forward pass, which counts the choices of all of them first. A
            router that is called on its own takes its input tokens as the batch.
    """

    weight: Weight = 1e-2
    choices: Literal["first", "all", "mean"] = "first"
    padding: Literal["masked", "diluted", "counted", "unsent"] = "masked"
    per_token: bool = False
    ema: Chance = 0.0
    name: str = "balance"
    span: Literal["group", "sequence"] = "group"
    over: Literal["span", "batch"] = "span"

    needs_token_choice = True

    def __post_init__(self):
        super().__post_init__()
        if self.over != "batch":
            return
        wrong = {
            "choices='first'": self.choices == "first",
            f"padding={self.padding!r}": self.padding != "masked",
            f"ema={self.ema}": self.ema > 0,
        }
        for setting in (name for name, is_wrong in wrong.items() if is_wrong):
            raise ConfigError(
                f"LoadBalance(over='batch') counts all choices of tokens in one step, so {setting} "
                "does not fit: use choices='mean' or 'all', padding='masked' and ema=0"
            )

    def state_shapes(self, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape ``(E,)`` of the fraction's array, if it is not of the span.

        ``load_ema`` is the average over steps. ``batch_load`` has the choices of all microbatches
        during a step, and is zero between steps.
        """
        wanted = {"load_ema": self.ema > 0, BATCH_LOAD: self.over == "batch"}
        return {name: (num_experts,) for name, is_wanted in wanted.items() if is_wanted}

    def next_state(
        self,
        state: dict[str, Array],
        demand: Float[Array, "... E"],
        observed: Mapping[str, Array] = NOTHING,
    ) -> dict[str, Array]:
        """Returns the state with the average after a step."""
        if not self.ema:
            return state
        share = demand / jnp.maximum(demand.sum(-1, keepdims=True), 1)
        return state | {"load_ema": self.ema * state["load_ema"] + (1 - self.ema) * share}

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Float[Array, ""]:
        """Returns the loss of one group, a scalar."""
        choice, scores, valid = token_choice(selection), scored.clean, inputs.valid
        if self.per_token:
            scores = jax.nn.softmax(scored.log_clean, axis=-1)
        num_tokens, num_experts = scores.shape
        everyone = jnp.ones_like(valid)
        mask_sent = everyone if self.padding == "counted" else valid
        mask_proxy = everyone if self.padding in ("counted", "unsent") else valid
        tokens = jnp.maximum(valid.sum(), 1) if self.padding == "masked" else num_tokens
        chosen = sent(choice, num_experts, inputs, 1 if self.choices == "first" else None)
        chosen = chosen / (per_token(choice, inputs) if self.choices == "mean" else 1)
        fraction = jnp.where(mask_sent[:, None], chosen, 0).sum(0) / tokens
        if self.ema:
            fraction = inputs.needs_state("load_ema", "LoadBalance(ema)", "(E,) zeros at first")
        if self.over == "batch":
            load = inputs.state.get(BATCH_LOAD, jnp.zeros(num_experts))
            each = 1 if self.choices == "mean" else per_token(choice, inputs)
            fraction = jnp.where(load.sum() > 0, load * each / jnp.maximum(load.sum(), 1), fraction)
        proxy = jnp.where(mask_proxy[:, None], scores, 0).sum(0) / tokens
        loss = num_experts * wide_einsum("e,e->", jax.lax.stop_gradient(fraction), proxy)
        return loss * valid.mean(dtype=loss.dtype) if self.padding == "counted" else loss


@dataclasses.dataclass(frozen=True)
class FreeBalance(Balance):
    """The balance loss with a smaller weight of free experts (MoE++, 2410.07348, equation 8).

    The loss is the sum over all experts of the fraction of tokens that chose the expert, times its
    mean score, times ``share`` for free experts. A smaller share sends more tokens to them.

    Attributes:
        weight: Factor in the objective (MoE++: 1e-2).
        free: Number of free experts, the last ones.
        share: Weight ``tau`` of a free expert.
        name: Name of the logged metric.
    """

    weight: Weight = 1e-2
    free: Natural = 4
    share: Share = 0.75
    name: str = "balance"

    needs_token_choice = True

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Float[Array, ""]:
        """Returns the loss of one group, a scalar."""
        experts = scored.clean.shape[1]
        chosen = mean_over(sent(token_choice(selection), experts, inputs), inputs.valid)
        weight = jnp.where(jnp.arange(experts) < experts - self.free, 1.0, self.share)
        proxy = mean_over(scored.clean, inputs.valid)
        return wide_einsum("e,e->", jax.lax.stop_gradient(weight * chosen), proxy)


@dataclasses.dataclass(frozen=True)
class SecondBalance(Balance):
    """The balance of second choices among all experts but the first choice (Mesh-TensorFlow).

    Mesh-TensorFlow adds the loss at half the weight of ``LoadBalance`` and found it "a wash".
    Padding makes no second choice, but padding counts in the mean scores (where no first choice is
    excluded) and in both denominators.

    Attributes:
        weight: Factor in the objective.
        name: Name of the logged metric.
    """

    weight: Weight = 5e-3
    name: str = "second_balance"

    needs_token_choice = True
    needs_second_choice = True

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Float[Array, ""]:
        """Returns the loss of one group, a scalar."""
        choice, num_experts = token_choice(selection), scored.clean.shape[1]
        one_hot = jax.nn.one_hot(choice.expert, num_experts, dtype=scored.clean.dtype)
        one_hot *= inputs.valid[:, None, None]
        least = jnp.finfo(scored.clean.dtype).min
        rest = jnp.where(one_hot[:, 0] > 0, least, scored.log_clean)
        proxy = jax.nn.softmax(rest, axis=-1).mean(0)
        fraction = one_hot[:, 1].mean(0)
        return num_experts * wide_einsum("e,e->", jax.lax.stop_gradient(fraction), proxy)


@dataclasses.dataclass(frozen=True)
class DeviceBalance(Balance):
    """The balance of computation over devices (DeepSeekMoE equations 15-17; DeepSeek-V2 26-28).

    The loss sums over devices the mean fraction of a device's experts times the sum of their mean
    scores. It is 1 if both factors are uniform.

    Attributes:
        weight: Factor ``alpha_2`` in the objective.
        devices: ``D``, the number of groups of neighbouring experts.
        name: Name of the logged metric.
        span: Tokens over which one loss is computed, as in ``LoadBalance``.
    """

    weight: Weight = 0.05
    devices: Positive = 8
    name: str = "device_balance"
    span: Literal["group", "sequence"] = "group"

    needs_token_choice = True

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if ``devices`` does not divide the number of experts."""
        check_devices(num_experts, self.devices, "DeviceBalance")

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Float[Array, ""]:
        """Returns the loss of one group, a scalar."""
        choice = token_choice(selection)
        experts, k = scored.clean.shape[1], per_token(choice, inputs)
        fraction = mean_over(sent(choice, experts, inputs), inputs.valid) * experts / k
        fraction = by_device(fraction, self.devices) * self.devices / experts
        proxy = by_device(mean_over(scored.clean, inputs.valid), self.devices)
        return wide_einsum("e,e->", jax.lax.stop_gradient(fraction), proxy)


@dataclasses.dataclass(frozen=True)
class CommunicationBalance(Balance):
    """The balance of tokens received by devices (DeepSeek-V2, 2405.04434, equations 29-31).

    Attributes:
        weight: Factor ``alpha_3`` in the objective.
        devices: ``D``, the number of groups of neighbouring experts.
        keep: Devices per token (the paper's ``M``).
        name: Name of the logged metric.
        span: Tokens over which one loss is computed, as in ``LoadBalance``.
    """

    weight: Weight = 0.02
    devices: Positive = 8
    keep: Positive = 3
    name: str = "communication_balance"
    span: Literal["group", "sequence"] = "group"

    needs_token_choice = True

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if ``devices`` does not divide the number of experts."""
        check_devices(num_experts, self.devices, "CommunicationBalance")

    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Float[Array, ""]:
        """Returns the loss of one group, a scalar."""
        chosen = sent(token_choice(selection), scored.clean.shape[1], inputs)
        visits = (by_device(chosen, self.devices) > 0).astype(scored.clean.dtype)
        fraction = mean_over(visits, inputs.valid) * self.devices / self.keep
        proxy = by_device(mean_over(scored.clean, inputs.valid), self.devices)
        return wide_einsum("e,e->", jax.lax.stop_gradient(fraction), proxy)
