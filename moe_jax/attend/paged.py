"""The view of one step of many sequences on a cache whose entries are in pages."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.attend.view import Mix, Relative, View


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedView:
    """The causal view of the tokens of a step on their sequences, whose entries are in pages.

    The ``N`` tokens of a step are rows of one token. They are in parts, one after the other: a part
    has ``R`` sequences of ``L`` successive tokens. Position ``p`` of a sequence has entry
    ``p % page`` of the page ``p // page`` in its table. A page may be in several tables.

    Attributes:
        positions: Positions ``(N, 1)`` of the tokens in their sequences, int32.
        entries: Index ``(N,)`` of each token's own entry among all entries of all pages.
        tables: For each part the pages ``(R, pages)`` of its sequences, int32.
        relative: Bias by the distance of query and key, or ``None``.
        lengths: For each part the number ``L`` of tokens per sequence.
        page: Number of entries per page.
        layer: Index of the layer, if keys and values are those of several layers, which are stacked
            along a leading axis.
    """

    positions: Int[Array, "N 1"]
    entries: Int[Array, " N"]
    tables: tuple[Int[Array, "R pages"], ...]
    relative: Relative | None = None
    lengths: tuple[int, ...] = dataclasses.field(default=(1,), metadata={"static": True})
    page: int = dataclasses.field(default=16, metadata={"static": True})
    layer: Int[Array, ""] | None = None

    def of_layer(self, layer: Int[Array, ""]) -> PagedView:
        """Returns the view on the pages of one of several layers."""
        return dataclasses.replace(self, layer=layer)

    @property
    def own(self) -> bool:
        """False: the keys are those of the cache."""
        return False

    def put(self, old: Float[Array, "*layers 1 H E D"], new: Float[Array, "N H 1 D"]) -> Array:
        """Returns the cached keys or values ``old``, with those of the step at its entries."""
        # An index of the layer and one of entries, between slices, bring the entries to the front.
        if self.layer is not None:
            return old.at[self.layer, 0, :, self.entries].set(new.astype(old.dtype)[:, :, 0])
        return old.at[0, :, self.entries].set(new.astype(old.dtype)[:, :, 0])

    def over(self, mix: Mix, q: Array, kv: dict[str, Array], reach: int = 0) -> Array:
        """Returns the mixed values ``(N, H, 1, V)`` of all queries.

        Args:
            mix: Function of the queries, the keys and values, and the view of one part.
            q: Queries ``(N, H, 1, D)``.
            kv: Keys and values ``(1, H, E, D)`` of all pages, by name; with ``layer`` of all
                layers.
            reach: Number of tokens before which a query attends to none, its own included, as in a
                window; 0 if it attends to all. Pages out of reach are not read.
        """
        mixed, start = [], 0
        for table, length in zip(self.tables, self.lengths, strict=True):
            rows, width = len(table), q.shape[1]
            own = slice(start, start := start + rows * length)
            positions = self.positions[own].reshape(rows, length)
            table, first = self._in_reach(table, positions[:, 0], length, reach)
            keys = {name: self._read(x, table) for name, x in kv.items()}
            queries = q[own].reshape(rows, length, width, -1).swapaxes(1, 2)
            part = mix(queries, keys, self._of_part(table, positions, first))
            mixed.append(part.swapaxes(1, 2).reshape(rows * length, width, 1, -1))
        return jnp.concatenate(mixed)

    def _in_reach(
        self, table: Int[Array, "R pages"], start: Int[Array, " R"], length: int, reach: int
    ) -> tuple[Int[Array, "R reached"], Int[Array, " R"]]:
        """Returns the pages that ``length`` queries from ``start`` reach, and the first's index."""
        pages = table.shape[1]
        most = min((reach + length - 3) // self.page + 2, pages) if reach else pages
        first = jnp.clip((start - reach + 1) // self.page, 0, pages - most)
        first = jnp.zeros_like(start) if most == pages else first
        columns = first[:, None] + jnp.arange(most)
        return jnp.take_along_axis(table, columns, axis=1), first

    def _read(self, x: Float[Array, "*layers 1 H E D"], table: Int[Array, "R pages"]) -> Array:
        """Returns the entries ``(R, H, T, D)`` of the sequences, in order."""
        heads, width = x.shape[-3], x.shape[-1]
        pages = x.reshape(-1, heads, x.shape[-2] // self.page, self.page, width)
        found = pages[0 if self.layer is None else self.layer, :, table]
        return found.swapaxes(1, 2).reshape(len(table), heads, -1, width)

    def _of_part(
        self, table: Int[Array, "R pages"], positions: Int[Array, "R L"], first: Int[Array, " R"]
    ) -> View:
        """Returns the view of sequences on the entries of their pages, from page ``first`` on."""
        before = first[:, None] * self.page
        keys = jnp.arange(table.shape[1] * self.page)
        ones = jnp.ones((len(table), len(keys)), jnp.int32)
        return View(
            jnp.ones_like(positions),
            positions,
            ones,
            before + keys,
            relative=self.relative,
            entries=positions - before,
        )
