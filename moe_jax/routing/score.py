"""From router logits to scores: how much each token and expert want each other.

Padded tokens have scores too, which Mesh-TensorFlow's losses read; all others mask them.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Softmax:
    """Softmax of the logits.

    Attributes:
        over: ``experts`` (every paper on token choice, and Expert Choice's equation 1) or
            ``tokens`` (Mesh-TensorFlow's and praxis' expert selection): the axis that sums to 1.
    """

    over: Literal["experts", "tokens"] = "experts"

    def __call__(self, logits: Array, valid: Array) -> Array:
        """Returns scores ``(S, E)`` for logits ``(S, E)``."""
        if self.over == "experts":
            return jax.nn.softmax(logits, axis=1)
        masked = jnp.where(valid[:, None], logits, jnp.finfo(logits.dtype).min)
        return jax.nn.softmax(masked, axis=0) * valid[:, None]


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """Independent sigmoid of each logit (DeepSeek-V3 equation 15, Llama 4)."""

    def __call__(self, logits: Array, valid: Array) -> Array:
        """Returns scores ``(S, E)`` for logits ``(S, E)``."""
        del valid
        return jax.nn.sigmoid(logits)


Score = Softmax | Sigmoid
