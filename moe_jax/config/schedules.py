"""Schedules of the learning rate after the warm-up, as factors of its peak."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from moe_jax.errors import ConfigError
from moe_jax.ranges import Positive, PositiveShare, Ranged, Share


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
        return _half_cosine((step - warmup) / max(steps - warmup, 1), self.final)


@dataclasses.dataclass(frozen=True)
class CosineRestarts(Ranged):
    """Cosine schedule with warm restarts (SGDR, 1608.03983) at chosen steps.

    After each restart the learning rate jumps to its peak and falls along half a cosine until the
    next restart, or until the last step of the run.

    Attributes:
        restarts: Steps after which the learning rate restarts, in increasing order.
        final: Learning rate at the end of each fall, as a share of the peak.
    """

    restarts: tuple[Positive, ...] = ()
    final: Share = 0.1

    def __post_init__(self):
        """Raises ``ConfigError`` unless the restarts increase."""
        super().__post_init__()
        if any(a >= b for a, b in itertools.pairwise(self.restarts)):
            raise ConfigError(
                f"CosineRestarts.restarts={self.restarts} must be steps in increasing order, such "
                "as (1000,3000)"
            )

    def check(self, warmup: int, steps: int) -> None:
        """Rejects restarts outside a run of ``steps`` steps, of which ``warmup`` warm up.

        Raises:
            ConfigError: If a restart is within the warm-up, or not before the last step.
        """
        if not all(warmup < restart < steps for restart in self.restarts):
            raise ConfigError(
                f"optimizer.schedule.restarts={self.restarts} must be after "
                f"optimizer.warmup_steps={warmup} and before training.steps={steps}"
            )

    def factor(self, step: jax.Array, warmup: int, steps: int) -> jax.Array:
        """Returns the factor of the peak at ``step``."""
        ends = (warmup, *self.restarts, steps)
        lengths = [max(b - a, 1) for a, b in itertools.pairwise(ends)]
        # The step of a restart still ends the fall before it.
        fall = jnp.searchsorted(jnp.array(self.restarts, jnp.float32), step)
        begin, length = (jnp.array(x, jnp.float32)[fall] for x in (ends[:-1], lengths))
        return _half_cosine((step - begin) / length, self.final)


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
class WarmupStableDecay(Ranged):
    """Warm-up, stable, decay (Hu et al., 2404.06395): the learning rate stays, then falls linearly.

    A run before its decay can be extended, since the decay alone depends on the number of steps.

    Attributes:
        decay: Share of all steps in which the learning rate falls.
        final: Learning rate at the last step, as a share of the peak.
    """

    decay: PositiveShare = 0.2
    final: Share = 0.0

    def factor(self, step: jax.Array, warmup: int, steps: int) -> jax.Array:
        """Returns the factor of the peak at ``step``."""
        del warmup
        length = max(self.decay * steps, 1.0)
        done = jnp.clip((step - (steps - length)) / length, 0.0, 1.0)
        return 1 - (1 - self.final) * done


@dataclasses.dataclass(frozen=True)
class ExponentialRise(Ranged):
    """Exponential rise to the peak at the last step, for a test of learning rates (1506.01186).

    Attributes:
        start: Learning rate at the first step, as a share of the peak.
    """

    start: PositiveShare = 1e-6

    def factor(self, step: jax.Array, warmup: int, steps: int) -> jax.Array:
        """Returns the factor of the peak at ``step``."""
        del warmup
        left = jnp.clip((steps - step) / max(steps - 1, 1), 0.0, 1.0)
        return jnp.float32(self.start) ** left


def _half_cosine(done: jax.Array, final: float) -> jax.Array:
    """Returns the factor from 1 to ``final`` after a share ``done`` of a fall."""
    return final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0.0, 1.0)))
