"""The cache of keys and values, with which a model reads every token once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moe_jax.attend import View
from moe_jax.models.stack import StackCache
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
    by_distance = None if relative is None else relative.by_distance
    if cache is None:
        return View(segments, positions, relative=by_distance)
    start = cache.used - segments.shape[1]
    return View(segments, positions, cache.segments, cache.positions, start, by_distance)
