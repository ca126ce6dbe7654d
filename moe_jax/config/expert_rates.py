"""Rules that scale the learning rate of each expert by its use."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.errors import ConfigError
from moe_jax.ranges import Chance, NonNegative, Ranged


@dataclasses.dataclass(frozen=True)
class ExpertRates(Ranged):
    """A learning rate per expert, by the number of tokens that its gradient is computed from.

    The number of tokens is the batch size of an expert, and rules for batch sizes apply to it
    (Hunyuan-Large, 2411.02265). The factor of an expert with the mean use of its layer is 1.

    Attributes:
        rule: Factor of an expert with ``b`` tokens in a layer with ``m`` tokens per expert:
            ``sqrt(b / m)`` (``sqrt``, for rules such as Adam: Malladi et al. 2205.10287), ``b / m``
            (``linear``, for SGD: Goyal et al. 1706.02677), or the ratio of the best rates
            ``1 / (sqrt(n / b) + sqrt(b / n))`` (``surge``, for rules such as Adam: Li et al.
            2405.14578).
        decay: Share of the mean number of tokens that each update keeps; 0 reads the last step.
        noise_tokens: Number of tokens ``n`` of the rule ``surge``, at which the gradient of an
            expert has as much noise as signal; its rate is largest there.
    """

    rule: Literal["sqrt", "linear", "surge"] = "sqrt"
    decay: Chance = 0.99
    noise_tokens: NonNegative = 0.0

    def check(self) -> None:
        """Rejects a number of tokens that no rule reads, or that the rule lacks.

        Raises:
            ConfigError: If so.
        """
        if (self.rule == "surge") != bool(self.noise_tokens):
            raise ConfigError(
                "optimizer.expert_rates.noise_tokens belongs to the rule surge: set both or none"
            )

    def factors(self, tokens: Float[Array, "*layers E"]) -> Float[Array, "*layers E"]:
        """Returns the factors of the learning rates of experts.

        Args:
            tokens: Mean numbers of tokens of the experts of a layer.
        """
        mean, n = tokens.mean(-1, keepdims=True), self.noise_tokens
        ratio = jnp.where(mean > 0, tokens / jnp.where(mean > 0, mean, 1.0), 1.0)
        match self.rule:
            case "linear":
                return ratio
            case "sqrt":
                return jnp.sqrt(ratio)
            case "surge":
                return jnp.sqrt(ratio) * (n + mean) / (n + tokens)
