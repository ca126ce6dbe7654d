"""The mask of attention as structure: segments, order, windows, chunks and relative positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.parallel import axis_size, constrain

MASKED = -1e30
# A function of queries ``(B, H, L, D)``, keys and values by name, and the view of the queries on
# them, which returns the mixed values ``(B, H, L, V)``.
Mix = Callable[[Array, dict[str, Array], "View"], Array]


@runtime_checkable
class Relative(Protocol):
    """A bias of scores by the distance of query and key; its arrays are leaves of a tree."""

    def __call__(
        self, queries: Int[Array, "*B L"], keys: Int[Array, " T"]
    ) -> Float[Array, "#B H L T"]:
        """Returns the bias ``(B or 1, H, L, T)`` for indices of queries and keys."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """Which keys each query attends to, held as vectors of queries and of keys.

    A query attends to the keys of its segment. In a causal view, a query attends to no key that is
    later than the key of its own token. The matrix of a mask exists only where ``bias`` is called.

    Attributes:
        segments: Segments ``(B, L)`` of the queries, int32, 0 for padding.
        positions: Positions ``(B or 1, L)`` of the queries, int32. Within a segment of a row they
            count up by one.
        key_segments: Segments ``(B, T)`` of the keys, int32; ``None`` means that the keys are those
            of the queries' own tokens.
        key_positions: Positions ``(B or 1, T)`` of the keys, int32; ``None`` means that the keys
            have the positions of the queries.
        start: Index in the cache at which the keys of the queries' tokens are written.
        relative: Bias by the distance of the indices of query and key, or ``None``.
        entries: Index ``(B or 1, L)`` among the keys of the key of each query's own token; ``None``
            counts from ``start``.
        causal: True masks later keys.
    """

    segments: Int[Array, "B L"]
    positions: Int[Array, "#B L"]
    key_segments: Int[Array, "B T"] | None = None
    key_positions: Int[Array, "#B T"] | None = None
    start: Int[Array, ""] | int = 0
    relative: Relative | None = None
    entries: Int[Array, "#B L"] | None = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def own(self) -> bool:
        """True if the keys are those of the queries' own tokens, without a cache or a memory."""
        return self.key_segments is None

    def put(self, old: Float[Array, "B H T D"], new: Float[Array, "B H L D"]) -> Array:
        """Returns the cached keys or values ``old``, with those of the queries' own tokens."""
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), self.start, axis=2)

    def over(self, mix: Mix, q: Array, kv: dict[str, Array], reach: int = 0) -> Array:
        """Returns ``mix`` of queries and keys; see ``moe_jax.attend.paged.PagedView.over``."""
        del reach
        return mix(q, kv, self)

    def bias(self, window: int = 0, chunk: int = 0) -> Float[Array, "B H L T"]:
        """Returns the float32 bias ``(B, H or 1, L, T)`` of the scores.

        Args:
            window: Number of keys in the window; 0 means no window.
            chunk: Number of positions per chunk; 0 means no chunks.
        """
        indices, keys = self._indices, self._segments_of_keys
        bias = _masked(self._seen)
        if self.relative is not None:
            bias = bias + _of_every_shard(self.relative, indices, keys)
        if window:
            bias = bias + _masked(self._distance < window)
        if chunk:
            bias = bias + _masked(self._same_chunk(chunk))
        return bias

    def mask(self, window: int = 0, chunk: int = 0) -> Bool[Array, "B L T"]:
        """Returns the mask ``(B, L, T)``, True where a query attends to a key; see ``bias``."""
        seen = self._seen
        if window:
            seen = seen & (self._distance < window)
        if chunk:
            seen = seen & self._same_chunk(chunk)
        return seen

    @property
    def _seen(self) -> Bool[Array, "B L T"]:
        keys = self._segments_of_keys
        same = self.segments[:, :, None] == keys[:, None, :]
        if not self.causal:
            return same
        return same & (jnp.arange(keys.shape[1]) <= self._indices[:, :, None])

    @property
    def _distance(self) -> Int[Array, "#B L T"]:
        """Distance of each query from each key, positive for earlier keys."""
        return self.positions[:, :, None] - self._positions_of_keys[:, None, :]

    def _same_chunk(self, size: int) -> Bool[Array, "#B L T"]:
        keys = self._positions_of_keys
        return self.positions[:, :, None] // size == keys[:, None, :] // size

    @property
    def _indices(self) -> Int[Array, "#B L"]:
        if self.entries is not None:
            return self.entries
        return (self.start + jnp.arange(self.segments.shape[1]))[None]

    @property
    def _segments_of_keys(self) -> Int[Array, "B T"]:
        return self.segments if self.key_segments is None else self.key_segments

    @property
    def _positions_of_keys(self) -> Int[Array, "#B T"]:
        return self.positions if self.key_positions is None else self.key_positions

    def with_keys(self) -> View:
        """Returns the view with all vectors present, so that its queries may be regrouped."""
        return dataclasses.replace(
            self,
            key_segments=self._segments_of_keys,
            key_positions=self._positions_of_keys,
            entries=self._indices,
        )


def _of_every_shard(
    relative: Relative, indices: Int[Array, "#B L"], segments: Int[Array, "B T"]
) -> Float[Array, "#B H L T"]:
    """Returns the bias of all rows, from a copy of its arrays for each shard of the batch.

    The gradient of a copy stays on its devices, so that devices sum the gradients of the arrays and
    not those of the bias, which is as large as the scores of a head.
    """
    rows, keys = segments.shape[0], jnp.arange(segments.shape[1])
    shards = axis_size("batch")
    if shards == 1 or rows % shards or len(indices) > 1:
        return relative(indices, keys)

    def copied(x: Array) -> Array:
        copies = jnp.broadcast_to(x, (shards, *x.shape))
        return constrain(copies, "batch", *(None,) * x.ndim)

    copies = jax.tree.map(copied, relative)
    bias = jax.vmap(lambda one: one(indices, keys))(copies)
    bias = jnp.broadcast_to(bias, (shards, rows // shards, *bias.shape[2:]))
    return bias.reshape(rows, *bias.shape[2:])


def _masked(seen: Bool[Array, "#B L T"]) -> Float[Array, "#B 1 L T"]:
    return jnp.where(seen, 0.0, MASKED)[:, None].astype(jnp.float32)
