"""The cache of keys and values, with which a model reads every token once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moe_jax.models.stack import StackCache
from moe_jax.nn.attention import View, cached_bias
from moe_jax.nn.positions import RelativeBias


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The tokens in ``T`` cache entries, of which the first ``used`` are filled.

    Attributes:
        layers: Keys and values of every layer; latent attention caches latents.
        segments: Segments ``(B, T)`` int32, 0 for padding and for free entries.
        positions: Positions ``(B, T)`` int32.
        used: Number of filled entries, an int32 scalar. All rows have the same number: shorter
            prompts are padded in front.
    """

    layers: StackCache
    segments: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    used: Int[Array, ""]

    @classmethod
    def empty(cls, layers: StackCache, batch: int, slots: int) -> Cache:
        """Returns a cache whose ``slots`` entries per row are all free."""
        free = jnp.zeros((batch, slots), jnp.int32)
        return cls(layers, free, free, jnp.int32(0))

    def extended(self, segments: Int[Array, "B L"], positions: Int[Array, "B L"]) -> Cache:
        """Returns the cache with entries for tokens of ``segments`` and ``positions (B, L)``."""

        def put(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, self.used, axis=1)

        return dataclasses.replace(
            self,
            segments=put(self.segments, segments),
            positions=put(self.positions, positions),
            used=self.used + segments.shape[1],
        )


def causal_view(
    segments: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    relative: RelativeBias | None,
    cache: Cache | None,
) -> View:
    """Returns the causal view of tokens ``(B, L)`` on each other and on the cache, if any.

    Args:
        segments: Segments ``(B, L)`` int32.
        positions: Positions ``(B, L)`` int32.
        relative: Relative positions of the stack, by cache entry.
        cache: Cache that is already extended by these tokens.
    """
    length = segments.shape[1]
    start = 0 if cache is None else cache.used - length
    keys = segments if cache is None else cache.segments
    entries = start + jnp.arange(length)
    bias = cached_bias(segments, keys, entries)
    if relative is not None:
        bias = bias + relative(entries, jnp.arange(keys.shape[1]))
    return View(bias, positions, positions if cache is None else cache.positions, start)
