"""The cache of keys and values, with which a model reads every token once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moe_jax.attend import PagedView, View
from moe_jax.attend.view import Relative
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

    def view(
        self,
        segments: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        relative: Relative | None,
    ) -> View:
        """Returns the view of tokens ``(B, L)``, by which the cache is extended already."""
        start = self.used - segments.shape[1]
        return View(segments, positions, self.segments, self.positions, start, relative)

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Pages of entries that sequences of unequal lengths share, and one step of these sequences.

    The tokens of a step are ``N`` rows of one token, ordered as in ``PagedView``. The cache of a
    layer is one row of ``pages * page`` entries.

    Attributes:
        layers: Keys and values of every layer, ``(1, H, pages * page, D)``.
        entries: Entry ``(N,)`` of each token of the step.
        tables: For each part of the step the pages ``(R, pages)`` of its sequences, int32.
        lengths: For each part the number of tokens per sequence.
        page: Number of entries per page.
    """

    layers: StackCache
    entries: Int[Array, " N"]
    tables: tuple[Int[Array, "R pages"], ...]
    lengths: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    page: int = dataclasses.field(metadata={"static": True})

    def extended(self, segments: Int[Array, "N 1"], positions: Int[Array, "N 1"]) -> PagedCache:
        """Returns the cache as it is: ``entries`` already names the entries of the step."""
        del segments, positions
        return self

    def view(
        self,
        segments: Int[Array, "N 1"],
        positions: Int[Array, "N 1"],
        relative: Relative | None,
    ) -> PagedView:
        """Returns the view of the tokens of the step on their sequences."""
        del segments
        return PagedView(positions, self.entries, self.tables, relative, self.lengths, self.page)


AnyCache = Cache | PagedCache


def own_view(
    segments: Int[Array, "B L"], positions: Int[Array, "B L"], relative: RelativeBias | None
) -> View:
    """Returns the causal view of tokens ``(B, L)`` on each other."""
    return View(segments, positions, relative=_by_distance(relative))


def cached_view(
    segments: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    relative: RelativeBias | None,
    cache: AnyCache,
) -> View | PagedView:
    """Returns the causal view of tokens ``(B, L)`` on a cache.

    Args:
        segments: Segments ``(B, L)`` int32.
        positions: Positions ``(B, L)`` int32.
        relative: Relative positions of the stack, by cache entry.
        cache: Cache that is already extended by these tokens.
    """
    return cache.view(segments, positions, _by_distance(relative))


def _by_distance(relative: RelativeBias | None) -> Relative | None:
    return None if relative is None else relative.by_distance
