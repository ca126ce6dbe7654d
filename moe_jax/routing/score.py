"""From router logits to scores: how much each token and expert want each other.

Padded tokens have scores too, which Mesh-TensorFlow's losses read; all others mask them.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from moe_jax.errors import ConfigError
from moe_jax.ranges import NonNegative, Positive, Ranged
from moe_jax.routing.inputs import Inputs, Scored

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class GaussianNoise(Ranged):
    """Normal noise on the logits in training, of standard deviation ``std / E`` (V-MoE)."""

    std: NonNegative = 1.0

    @property
    def planes(self) -> int:
        """Logits per token and expert."""
        return 1

    def deviation(self, inputs: Inputs) -> Array:
        """Returns the standard deviation ``(S, E)``."""
        return jnp.full_like(inputs.logits, self.std / inputs.logits.shape[1])


@dataclasses.dataclass(frozen=True)
class LearnedNoise(Ranged):
    """Normal noise in training with a learned deviation per token and expert (Shazeer 2017, eq 4).

    The second plane of the logits is ``x W_noise``; its softplus is the standard deviation.
    """

    @property
    def planes(self) -> int:
        """Logits per token and expert."""
        return 2

    def deviation(self, inputs: Inputs) -> Array:
        """Returns the standard deviation ``(S, E)``."""
        return jax.nn.softplus(inputs.planes[..., 1])


class Score(Ranged, abc.ABC):
    """Logits to scores. A subclass is a frozen dataclass."""

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if the score cannot work with ``num_experts``."""
        del num_experts

    @property
    def planes(self) -> int:
        """Logits per token and expert that it reads."""
        return 1

    @abc.abstractmethod
    def __call__(self, inputs: Inputs) -> Scored:
        """Returns the scores of one group."""


@dataclasses.dataclass(frozen=True)
class Softmax(Score):
    """Softmax of the logits.

    Attributes:
        over: ``experts`` (every paper on token choice, and Expert Choice's equation 1) or
            ``tokens`` (Mesh-TensorFlow's and praxis' expert selection): the axis that sums to 1.
        noise: on the logits in training.
    """

    over: Literal["experts", "tokens"] = "experts"
    noise: GaussianNoise | LearnedNoise | None = None

    @property
    def planes(self) -> int:
        """Logits per token and expert that it reads."""
        return 1 if self.noise is None else self.noise.planes

    def __call__(self, inputs: Inputs) -> Scored:
        """Returns the scores of one group."""
        clean = self._of(inputs.logits, inputs.valid)
        if self.noise is None or inputs.rng is None:
            return Scored(clean, clean, inputs.logits, None)
        deviation = self.noise.deviation(inputs)
        key = jax.random.fold_in(inputs.rng, 1)
        noisy = inputs.logits + deviation * jax.random.normal(key, deviation.shape, deviation.dtype)
        return Scored(self._of(noisy, inputs.valid), clean, noisy, deviation)

    def _of(self, logits: Array, valid: Array) -> Array:
        if self.over == "experts":
            return jax.nn.softmax(logits, axis=1)
        masked = jnp.where(valid[:, None], logits, jnp.finfo(logits.dtype).min)
        return jax.nn.softmax(masked, axis=0) * valid[:, None]


@dataclasses.dataclass(frozen=True)
class Sigmoid(Score):
    """Independent sigmoid of each logit (BASE, DeepSeek-V3 equation 15, Llama 4)."""

    def __call__(self, inputs: Inputs) -> Scored:
        """Returns the scores of one group."""
        scores = jax.nn.sigmoid(inputs.logits)
        return Scored(scores, scores, inputs.logits, None)


@dataclasses.dataclass(frozen=True)
class TwoLevelSoftmax(Score):
    """Softmax over groups of experts, times a softmax within each (Shazeer 2017, appendix B).

    The primary logit of a group is the mean over its experts of the second plane, which is any
    linear map of the token. Groups are neighbouring experts.

    Attributes:
        groups: their number; it divides ``E``.
    """

    groups: Positive = 4

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if the groups do not divide the experts."""
        if num_experts % self.groups:
            raise ConfigError(
                f"score.groups={self.groups} does not divide {num_experts} experts: change it"
            )

    @property
    def planes(self) -> int:
        """Logits per token and expert that it reads."""
        return 2

    def __call__(self, inputs: Inputs) -> Scored:
        """Returns the scores of one group."""
        tokens, experts = inputs.logits.shape
        shape = (tokens, self.groups, experts // self.groups)
        primary = jax.nn.softmax(inputs.planes[..., 1].reshape(shape).mean(-1), axis=-1)
        secondary = jax.nn.softmax(inputs.logits.reshape(shape), axis=-1)
        scores = (primary[..., None] * secondary).reshape(tokens, experts)
        return Scored(scores, scores, inputs.logits, None)


@dataclasses.dataclass(frozen=True)
class Uniform(Score):
    """``1 / E`` everywhere, for routers that learn nothing."""

    def __call__(self, inputs: Inputs) -> Scored:
        """Returns the scores of one group."""
        scores = jnp.full_like(inputs.logits, 1 / inputs.logits.shape[1])
        return Scored(scores, scores, inputs.logits, None)
