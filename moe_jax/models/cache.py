"""What a model keeps of the tokens it has read, so that it reads each once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.models.stack import StackCache
from moe_jax.nn.attention import View, cached_bias
from moe_jax.nn.positions import RelativeBias

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys, values and places of ``T`` slots, of which the first ``used`` are taken.

    Attributes:
        layers: of every layer; latent attention keeps latents.
        segments: ``(B, T)`` int32, 0 for padding and for free slots.
        positions: ``(B, T)`` int32.
        used: int32 scalar, the same for all rows: shorter prompts are padded in front.
    """

    layers: StackCache
    segments: Array
    positions: Array
    used: Array

    @classmethod
    def empty(cls, layers: StackCache, batch: int, slots: int) -> Cache:
        """Returns a cache in which no slot is taken."""
        free = jnp.zeros((batch, slots), jnp.int32)
        return cls(layers, free, free, jnp.int32(0))

    def extended(self, segments: Array, positions: Array) -> Cache:
        """Returns the cache with places for tokens of ``segments`` and ``positions (B, L)``."""

        def put(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, self.used, axis=1)

        return dataclasses.replace(
            self,
            segments=put(self.segments, segments),
            positions=put(self.positions, positions),
            used=self.used + segments.shape[1],
        )


def causal_view(
    segments: Array, positions: Array, relative: RelativeBias | None, cache: Cache | None
) -> View:
    """Returns what tokens ``(B, L)`` see of each other and, given one, of a cache.

    Args:
        segments: ``(B, L)`` int32.
        positions: ``(B, L)`` int32.
        relative: the stack's relative positions, by slot.
        cache: already extended by these tokens.
    """
    length = segments.shape[1]
    start = 0 if cache is None else cache.used - length
    keys = segments if cache is None else cache.segments
    place = start + jnp.arange(length)
    bias = cached_bias(segments, keys, place)
    if relative is not None:
        bias = bias + relative(place, jnp.arange(keys.shape[1]))
    return View(bias, positions, positions if cache is None else cache.positions, start)
