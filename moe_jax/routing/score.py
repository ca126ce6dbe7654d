"""Maps router logits to scores of tokens and experts.

Padding has scores too, because Mesh-TensorFlow's losses read them; all other losses mask them.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.errors import ConfigError
from moe_jax.ranges import NonNegative, Positive, Ranged
from moe_jax.routing.inputs import Inputs, Scored


@dataclasses.dataclass(frozen=True)
class GaussianNoise(Ranged):
    """Normal noise on the logits in training, of standard deviation ``std / E`` (V-MoE).

    Attributes:
        std: Standard deviation times ``E``.
    """

    std: NonNegative = 1.0

    @property
    def planes(self) -> int:
        """The number of logits per token and expert."""
        return 1

    def deviation(self, inputs: Inputs) -> Float[Array, "S E"]:
        """Returns the standard deviation ``(S, E)`` of the noise."""
        std = inputs.settings.get("noise", self.std)
        return jnp.full_like(inputs.logits, std / inputs.logits.shape[1])


@dataclasses.dataclass(frozen=True)
class LearnedNoise(Ranged):
    """Normal noise in training with a learned deviation (Shazeer et al. 2017, equation 4).

    The second plane of the logits is ``x W_noise``; its softplus is the standard deviation per
    token and expert.
    """

    @property
    def planes(self) -> int:
        """The number of logits per token and expert."""
        return 2

    def deviation(self, inputs: Inputs) -> Float[Array, "S E"]:
        """Returns the standard deviation ``(S, E)`` of the noise."""
        return jax.nn.softplus(inputs.planes[..., 1])


class Score(Ranged, abc.ABC):
    """The map from logits to scores. A subclass is a frozen dataclass."""

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if the score cannot work with ``num_experts`` experts."""
        del num_experts

    @property
    def planes(self) -> int:
        """The number of logits per token and expert."""
        return 1

    def neighbour_groups(self) -> int:
        """Returns the number of groups of neighbouring experts that have a softmax each."""
        return 1

    @abc.abstractmethod
    def __call__(self, inputs: Inputs) -> Scored:
        """Returns the scores of one group."""


@dataclasses.dataclass(frozen=True)
class Softmax(Score):
    """The softmax of the logits.

    Attributes:
        over: Axis over which scores sum to 1: ``experts`` (every paper on token choice, and Expert
            Choice's equation 1) or ``tokens`` (expert choice in Mesh-TensorFlow and praxis).
        noise: Noise on the logits in training, or ``None``.
    """

    over: Literal["experts", "tokens"] = "experts"
    noise: GaussianNoise | LearnedNoise | None = None

    @property
    def planes(self) -> int:
        """The number of logits per token and expert."""
        return 1 if self.noise is None else self.noise.planes

    def __call__(self, inputs: Inputs) -> Scored:
        """Returns the scores of one group."""
        clean, log_clean = self._of(inputs.logits, inputs.valid)
        if self.noise is None or inputs.rng is None:
            return Scored(clean, clean, inputs.logits, None, log_clean, log_clean)
        deviation = self.noise.deviation(inputs)
        key = jax.random.fold_in(inputs.rng, 1)
        noisy = inputs.logits + deviation * jax.random.normal(key, deviation.shape, deviation.dtype)
        scores, log_scores = self._of(noisy, inputs.valid)
        return Scored(scores, clean, noisy, deviation, log_scores, log_clean)

    def _of(
        self, logits: Float[Array, "S E"], valid: Bool[Array, " S"]
    ) -> tuple[Float[Array, "S E"], Float[Array, "S E"]]:
        """Returns the softmax and its logarithm.

        In a softmax over tokens, the logarithm of padding is the least finite number.
        """
        if self.over == "experts":
            return jax.nn.softmax(logits, axis=1), jax.nn.log_softmax(logits, axis=1)
        present, least = valid[:, None], jnp.finfo(logits.dtype).min
        masked = jnp.where(present, logits, least)
        logs = jnp.where(present, jax.nn.log_softmax(masked, axis=0), least)
        return jax.nn.softmax(masked, axis=0) * present, logs


@dataclasses.dataclass(frozen=True)
class Sigmoid(Score):
    """The sigmoid of each logit (BASE, DeepSeek-V3 equation 15, Llama 4)."""

    def __call__(self, inputs: Inputs) -> Scored:
        """Returns the scores of one group."""
        scores, logs = jax.nn.sigmoid(inputs.logits), jax.nn.log_sigmoid(inputs.logits)
        return Scored(scores, scores, inputs.logits, None, logs, logs)


@dataclasses.dataclass(frozen=True)
class Relu(Score):
    """The positive part of each logit (ReMoE, 2412.14711)."""

    def __call__(self, inputs: Inputs) -> Scored:
        """Returns the scores of one group."""
        scores = jax.nn.relu(inputs.logits)
        logs = jnp.log(jnp.maximum(scores, jnp.finfo(scores.dtype).tiny))
        return Scored(scores, scores, inputs.logits, None, logs, logs)


@dataclasses.dataclass(frozen=True)
class SqrtSoftplus(Score):
    """The square root of the softplus of each logit (``sqrtsoftplus`` in DeepSeek-V4)."""

    def __call__(self, inputs: Inputs) -> Scored:
        """Returns the scores of one group."""
        logs = log_softplus(inputs.logits) / 2
        scores = jnp.exp(logs)
        return Scored(scores, scores, inputs.logits, None, logs, logs)


def log_softplus(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns ``log(log(1 + exp(x)))``, which is finite where ``exp(x)`` underflows.

    Below -20 the softplus is ``exp(x)``, up to a relative error of 1e-9.
    """
    far = x < -20
    return jnp.where(far, x, jnp.log(jax.nn.softplus(jnp.where(far, 0, x))))


@dataclasses.dataclass(frozen=True)
class TwoLevelSoftmax(Score):
    """A softmax over groups of experts times a softmax in each group (Shazeer 2017, appendix B).

    A group consists of neighbouring experts. The primary logit of a group is the mean of the second
    plane over its experts, so it can be any linear map of the token.

    Attributes:
        groups: Number of groups, a divisor of ``E``.
    """

    groups: Positive = 4

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if ``groups`` does not divide the number of experts."""
        if num_experts % self.groups:
            raise ConfigError(
                f"score.groups={self.groups} does not divide {num_experts} experts: change it"
            )

    def neighbour_groups(self) -> int:
        """Returns the number of groups of experts."""
        return self.groups

    @property
    def planes(self) -> int:
        """The number of logits per token and expert."""
        return 2

    def __call__(self, inputs: Inputs) -> Scored:
        """Returns the scores of one group."""
        tokens, experts = inputs.logits.shape
        shape = (tokens, self.groups, experts // self.groups)
        primary = jax.nn.log_softmax(inputs.planes[..., 1].reshape(shape).mean(-1), axis=-1)
        secondary = jax.nn.log_softmax(inputs.logits.reshape(shape), axis=-1)
        logs = (primary[..., None] + secondary).reshape(tokens, experts)
        scores = jnp.exp(logs)
        return Scored(scores, scores, logs, None, logs, logs)


@dataclasses.dataclass(frozen=True)
class Uniform(Score):
    """The score ``1 / E`` for every token and expert, for routers without parameters."""

    def __call__(self, inputs: Inputs) -> Scored:
        """Returns the scores of one group."""
        scores = jnp.full_like(inputs.logits, 1 / inputs.logits.shape[1])
        logs = jnp.log(scores)
        return Scored(scores, scores, logs, None, logs, logs)
