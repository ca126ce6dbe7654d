"""Settings of the optimizer: rules, schedules and learning rates, as the papers use them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.ranges import (
    Chance,
    Epsilon,
    Factor,
    Natural,
    NonNegative,
    Positive,
    PositiveShare,
    Ranged,
    Share,
    Weight,
)


@dataclasses.dataclass(frozen=True)
class AdamW(Ranged):
    """AdamW (Loshchilov & Hutter, 1711.05101); matrices alone decay.

    Attributes:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: per step, times the learning rate.
    """

    b1: Chance = 0.9
    b2: Chance = 0.95
    eps: Epsilon = 1e-8
    weight_decay: Weight = 0.1

    def transform(self) -> optax.GradientTransformation:
        """Returns the update before the learning rate."""
        return optax.chain(
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            optax.add_decayed_weights(self.weight_decay, mask=_matrices),
        )


@dataclasses.dataclass(frozen=True)
class Adafactor(Ranged):
    """Adafactor (Shazeer & Stern, 1804.04235) as T5, GShard and Switch use it: no momentum.

    Attributes:
        decay_rate: the second moment decays by ``1 - t ** -decay_rate``.
        clipping_threshold: largest root mean square of an update.
        multiply_by_parameter_scale: make steps relative to the root mean square of the parameter.
        factored_from: matrices with both sides at least so long keep row and column statistics.
    """

    decay_rate: PositiveShare = 0.8
    clipping_threshold: Factor = 1.0
    multiply_by_parameter_scale: bool = True
    factored_from: Positive = 128

    def transform(self) -> optax.GradientTransformation:
        """Returns the update before the learning rate."""
        parts = [
            optax.scale_by_factored_rms(
                decay_rate=self.decay_rate, min_dim_size_to_factor=self.factored_from
            ),
            optax.clip_by_block_rms(self.clipping_threshold),
        ]
        if self.multiply_by_parameter_scale:
            parts.append(optax.scale_by_param_block_rms())
        return optax.chain(*parts)


@dataclasses.dataclass(frozen=True)
class Constant(Ranged):
    """The peak, after the warm-up."""

    def factor(self, step: jax.Array, warmup: int, steps: int) -> jax.Array:
        """Returns 1."""
        del warmup, steps
        return jnp.ones_like(step)


@dataclasses.dataclass(frozen=True)
class RSqrt(Ranged):
    """``sqrt(warmup / step)``: T5's rule; its printed rate 1.0 is the peak times sqrt(warmup)."""

    def factor(self, step: jax.Array, warmup: int, steps: int) -> jax.Array:
        """Returns the factor on the peak at ``step``."""
        del steps
        start = max(warmup, 1)
        return jnp.sqrt(start / jnp.maximum(step, start))


@dataclasses.dataclass(frozen=True)
class Cosine(Ranged):
    """Half a cosine from the peak down to ``final`` of it at the last step."""

    final: Share = 0.1

    def factor(self, step: jax.Array, warmup: int, steps: int) -> jax.Array:
        """Returns the factor on the peak at ``step``."""
        done = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return self.final + (1 - self.final) * 0.5 * (1 + jnp.cos(jnp.pi * done))


@dataclasses.dataclass(frozen=True)
class Linear(Ranged):
    """A straight line from the peak down to ``final`` of it at the last step."""

    final: Share = 0.0

    def factor(self, step: jax.Array, warmup: int, steps: int) -> jax.Array:
        """Returns the factor on the peak at ``step``."""
        done = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return 1 - (1 - self.final) * done


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Ranged):
    """The optimizer.

    Attributes:
        rule: how a gradient becomes an update.
        schedule: the learning rate after its warm-up.
        learning_rate: the peak.
        warmup_steps: steps of linear growth from 0 to the peak.
        clip_norm: largest global norm of the gradient; 0 for no clipping.
        expert_multiplier: factor on the learning rate of the experts.
        router_multiplier: factor on the learning rate of the routers.
    """

    rule: AdamW | Adafactor = AdamW()
    schedule: Constant | RSqrt | Cosine | Linear = Cosine()
    learning_rate: Factor = 1e-3
    warmup_steps: Natural = 100
    clip_norm: NonNegative = 1.0
    expert_multiplier: NonNegative = 1.0
    router_multiplier: NonNegative = 1.0


def _matrices(params: Any) -> Any:
    def one(param: nnx.Variable) -> nnx.Variable:
        metadata = param.get_metadata()
        return param.replace(metadata.get("decayed", len(metadata["axes"]) > 1))

    return map_variables(one, params)


def map_variables(function: Any, params: Any) -> Any:
    """Returns ``params`` with ``function`` applied to each ``nnx.Variable``."""
    return jax.tree.map(function, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
