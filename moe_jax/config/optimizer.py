"""Settings of the optimizer: update rules, schedules and learning rates of the papers."""

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
    """AdamW (Loshchilov & Hutter, 1711.05101), with weight decay on matrices only.

    Attributes:
        b1: Decay rate of the first moment.
        b2: Decay rate of the second moment.
        eps: Number added to the root of the second moment.
        weight_decay: Weight decay per step, multiplied by the learning rate.
    """

    b1: Chance = 0.9
    b2: Chance = 0.95
    eps: Epsilon = 1e-8
    weight_decay: Weight = 0.1

    def transform(self) -> optax.GradientTransformation:
        """Returns the gradient transformation, without the learning rate."""
        return optax.chain(
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            optax.add_decayed_weights(self.weight_decay, mask=_matrices),
        )


@dataclasses.dataclass(frozen=True)
class Adafactor(Ranged):
    """Adafactor (Shazeer & Stern, 1804.04235) without momentum, as T5, GShard and Switch use it.

    Attributes:
        decay_rate: Exponent of the decay rate ``1 - t ** -decay_rate`` of the second moment at step
            ``t``.
        clipping_threshold: Largest root mean square of an update.
        multiply_by_parameter_scale: True multiplies updates by the root mean square of the
            parameter.
        factored_from: Smallest side of a matrix whose second moment is factored into row and column
            statistics.
    """

    decay_rate: PositiveShare = 0.8
    clipping_threshold: Factor = 1.0
    multiply_by_parameter_scale: bool = True
    factored_from: Positive = 128

    def transform(self) -> optax.GradientTransformation:
        """Returns the gradient transformation, without the learning rate."""
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
    """Constant schedule: the learning rate stays at its peak after the warm-up."""

    def factor(self, step: jax.Array, warmup: int, steps: int) -> jax.Array:
        """Returns the factor 1 of the peak."""
        del warmup, steps
        return jnp.ones_like(step)


@dataclasses.dataclass(frozen=True)
class RSqrt(Ranged):
    """T5's schedule: the learning rate is the peak times ``sqrt(warmup_steps / step)``.

    The learning rate 1.0 that T5 reports is the peak times ``sqrt(warmup_steps)``.
    """

    def factor(self, step: jax.Array, warmup: int, steps: int) -> jax.Array:
        """Returns the factor of the peak at ``step``."""
        del steps
        start = max(warmup, 1)
        return jnp.sqrt(start / jnp.maximum(step, start))


@dataclasses.dataclass(frozen=True)
class Cosine(Ranged):
    """Cosine schedule: the learning rate falls along half a cosine until the last step.

    Attributes:
        final: Learning rate at the last step, as a share of the peak.
    """

    final: Share = 0.1

    def factor(self, step: jax.Array, warmup: int, steps: int) -> jax.Array:
        """Returns the factor of the peak at ``step``."""
        done = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return self.final + (1 - self.final) * 0.5 * (1 + jnp.cos(jnp.pi * done))


@dataclasses.dataclass(frozen=True)
class Linear(Ranged):
    """Linear schedule: the learning rate falls along a straight line until the last step.

    Attributes:
        final: Learning rate at the last step, as a share of the peak.
    """

    final: Share = 0.0

    def factor(self, step: jax.Array, warmup: int, steps: int) -> jax.Array:
        """Returns the factor of the peak at ``step``."""
        done = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return 1 - (1 - self.final) * done


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Ranged):
    """The optimizer.

    Attributes:
        rule: Update rule, from gradients to updates.
        schedule: Schedule of the learning rate after the warm-up.
        learning_rate: Peak of the learning rate.
        warmup_steps: Number of steps in which the learning rate grows linearly from 0 to its peak.
        clip_norm: Largest global norm of the gradient; 0 disables clipping.
        expert_multiplier: Factor of the learning rate for the experts.
        router_multiplier: Factor of the learning rate for the routers.
    """

    rule: AdamW | Adafactor = AdamW()
    schedule: Constant | RSqrt | Cosine | Linear = Cosine()
    learning_rate: Factor = 1e-3
    warmup_steps: Natural = 100
    clip_norm: NonNegative = 1.0
    expert_multiplier: NonNegative = 1.0
    router_multiplier: NonNegative = 1.0


def _matrices(params: Any) -> Any:
    """Returns True for each parameter that decays: by its ``decayed``, or with two axes or more."""

    def one(param: nnx.Variable) -> nnx.Variable:
        metadata = param.get_metadata()
        return param.replace(metadata.get("decayed", len(metadata["axes"]) > 1))

    return map_variables(one, params)


def map_variables(function: Any, params: Any) -> Any:
    """Returns ``params`` with ``function`` applied to each ``nnx.Variable``."""
    return jax.tree.map(function, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
