"""Tokens to vectors at the bottom of a model, and vectors to logits at its top."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.models.config import ModelConfig
from moe_jax.nn.init import weight
from moe_jax.nn.positions import Learned, RelativeBias, Sinusoidal, T5Relative, sinusoids
from moe_jax.parallel import constrain
from moe_jax.precision import wide_einsum

Array = jax.Array


class Embedding(nnx.Module):
    """The table of tokens, that of positions if they are learned, and the head."""

    def __init__(self, config: ModelConfig, vocab_size: int, key: Array, head_key: Array):
        """Makes ``table (V, M)``, ``places (P, M)`` if learned, ``head (M, V)`` if not tied."""
        width = config.width
        # Unit variance at the head, so tied logits start near unit scale.
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

    def __call__(self, tokens: Array, positions: Array) -> Array:
        """Returns ``(B, L, M)`` for ``tokens`` and ``positions (B, L)`` int32."""
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        # Rows are taken from a table with whole rows; XLA would replicate the result otherwise.
        x = constrain(self.table[...].astype(dtype), "vocab", None)[tokens]
        if config.scale_embedding:
            x = x * jnp.sqrt(config.width).astype(dtype)
        match config.positions:
            case Learned(offset=offset):
                x += self.places[...].astype(dtype)[positions + offset]
            case Sinusoidal(offset=offset):
                x += sinusoids(positions + offset, config.width).astype(dtype)
        return constrain(x, "batch", "length")

    def logits(self, hidden: Array) -> Array:
        """Returns float32 logits ``(B, L, V)`` for ``hidden (B, L, M)``."""
        if self.config.scale_head:
            hidden = hidden / jnp.sqrt(self.config.width).astype(hidden.dtype)
        if self.config.tie_embeddings:
            logits = wide_einsum("blm,vm->blv", hidden, self.table[...].astype(hidden.dtype))
        else:
            logits = wide_einsum("blm,mv->blv", hidden, self.head[...].astype(hidden.dtype))
        return constrain(logits, "batch", "length", "vocab")


def relative_bias(config: ModelConfig, key: Array, *, both_ways: bool) -> RelativeBias | None:
    """Returns the table of a stack, or ``None`` if positions are known otherwise."""
    if not isinstance(config.positions, T5Relative):
        return None
    return RelativeBias(
        config.num_heads,
        key,
        buckets=config.positions.buckets,
        max_distance=config.positions.max_distance,
        both_ways=both_ways,
    )
