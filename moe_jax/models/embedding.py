"""The embedding at the bottom of a model, and the head at its top."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moe_jax.models.config import ModelConfig
from moe_jax.nn.init import weight
from moe_jax.nn.positions import Learned, RelativeBias, Sinusoidal, T5Relative, sinusoids
from moe_jax.parallel import constrain
from moe_jax.precision import wide_einsum


class Embedding(nnx.Module):
    """The token embeddings, the position embeddings if they are learned, and the head."""

    def __init__(
        self, config: ModelConfig, vocab_size: int, key: PRNGKeyArray, head_key: PRNGKeyArray
    ):
        """Initialises ``table (V, M)``, and ``places (P, M)`` and ``head (M, V)`` if needed.

        A model has ``places`` if its positions are learned, and ``head`` if it is not tied.
        """
        width = config.width
        # The head has unit variance, so tied logits start near unit scale.
        fan_in = 1 if config.scale_head else width
        self.table = weight(key, (vocab_size, width), ("vocab", "embed"), fan_in=fan_in, scale=1.0)
        if isinstance(config.positions, Learned):
            shape = (config.positions.length + config.positions.offset, width)
            self.places = weight(
                jax.random.fold_in(key, 1), shape, (None, "embed"), fan_in=width, scale=1.0
            )
        if not config.tie_embeddings:
            self.head = weight(
                head_key, (width, vocab_size), ("embed", "vocab"), fan_in=width, scale=1.0
            )
        self.config = config

    def __call__(
        self, tokens: Int[Array, "B L"], positions: Int[Array, "B L"]
    ) -> Float[Array, "B L M"]:
        """Returns embeddings ``(B, L, M)`` for ``tokens`` and ``positions (B, L)`` int32."""
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        # Without whole rows in the table, XLA would replicate the result.
        x = constrain(self.table[...].astype(dtype), "vocab", None)[tokens]
        if config.scale_embedding:
            x = x * jnp.sqrt(config.width).astype(dtype)
        if config.embedding_factor != 1:
            x = x * config.embedding_factor
        match config.positions:
            case Learned(offset=offset):
                x += self.places[...].astype(dtype)[positions + offset]
            case Sinusoidal(offset=offset):
                x += sinusoids(positions + offset, config.width).astype(dtype)
        return constrain(x, "batch", "length")

    def logits(self, hidden: Float[Array, "B L M"]) -> Float[Array, "B L V"]:
        """Returns float32 logits ``(B, L, V)`` for ``hidden (B, L, M)``."""
        if self.config.scale_head:
            hidden = hidden / jnp.sqrt(self.config.width).astype(hidden.dtype)
        logits = self.products(hidden)
        if self.config.logit_factor != 1:
            logits = logits * self.config.logit_factor
        if self.config.logit_cap:
            logits = self.config.logit_cap * jnp.tanh(logits / self.config.logit_cap)
        return constrain(logits, "batch", "length", "vocab")

    def products(self, hidden: Float[Array, "B L M"]) -> Float[Array, "B L V"]:
        """Returns the float32 products of ``hidden (B, L, M)`` and the head."""
        if self.config.tie_embeddings:
            return wide_einsum("blm,vm->blv", hidden, self.table[...].astype(hidden.dtype))
        return wide_einsum("blm,mv->blv", hidden, self.head[...].astype(hidden.dtype))


def relative_bias(
    config: ModelConfig, key: PRNGKeyArray, *, both_ways: bool
) -> RelativeBias | None:
    """Returns the relative positions of a stack, or ``None`` for other kinds of positions."""
    if not isinstance(config.positions, T5Relative):
        return None
    return RelativeBias(
        config.num_heads,
        key,
        buckets=config.positions.buckets,
        max_distance=config.positions.max_distance,
        both_ways=both_ways,
    )
