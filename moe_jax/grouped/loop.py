"""Grouped products as a loop over blocks of rows, for CPUs.

Experts are visited in turn, each with as many blocks as its rows need, so the time follows the rows
and not the worst case. The number of blocks is a value and not a shape: nothing is compiled anew.
A large block makes the product efficient, and small blocks take the rest of an expert's rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.precision import exact

_LARGEST, _SMALLEST, _PARTS = 512, 16, 8


def block_sizes(rows: int, groups: int) -> tuple[int, int]:
    """Returns the numbers of rows of a large and of a small block.

    Args:
        rows: Number ``R`` of rows.
        groups: Number ``E`` of experts.
    """
    even = max(rows // groups, 1)
    large = min(max(1 << (even.bit_length() - 1), _SMALLEST), _LARGEST, rows)
    return large, min(max(large // _PARTS, _SMALLEST), large)


def product(
    rows: Float[Array, "R M"],
    matrices: Float[Array, "E ..."],
    sizes: Int[Array, " E"],
    transposed: bool = False,
) -> Float[Array, "R N"]:
    """Returns each row times the matrix of its expert; see ``moe_jax.grouped.Backend``."""
    precision, blocks = exact(rows.dtype), block_sizes(rows.shape[0], sizes.size)

    def one(out: Array, expert: tuple[Array, Array, Array]) -> tuple[Array, None]:
        matrix, start, end = expert

        def block(out: Array, begin: Array, size: int, whole: bool) -> Array:
            first, inside = _place(begin, size, rows.shape[0], end)
            x = jax.lax.dynamic_slice_in_dim(rows, first, size)
            y = jnp.dot(x, matrix.T if transposed else matrix, precision=precision)
            if not whole:
                y = jnp.where(inside, y, jax.lax.dynamic_slice_in_dim(out, first, size))
            return jax.lax.dynamic_update_slice_in_dim(out, y, first, 0)

        return over_blocks(block, out, blocks, start, end), None

    starts, ends = edges(sizes)
    out = jnp.zeros((rows.shape[0], matrices.shape[1 if transposed else 2]), rows.dtype)
    return jax.lax.scan(one, out, (matrices, starts, ends))[0]


def outer(
    rows: Float[Array, "R M"], others: Float[Array, "R N"], sizes: Int[Array, " E"]
) -> Float[Array, "E M N"]:
    """Returns for each expert the sum of the outer products of its rows."""
    precision, blocks = exact(rows.dtype), block_sizes(rows.shape[0], sizes.size)

    def one(_: None, edge: tuple[Array, Array]) -> tuple[None, Array]:
        start, end = edge

        def block(total: Array, begin: Array, size: int, whole: bool) -> Array:
            first, inside = _place(begin, size, rows.shape[0], end)
            x = jax.lax.dynamic_slice_in_dim(rows, first, size)
            x = x if whole else jnp.where(inside, x, 0)
            y = jax.lax.dynamic_slice_in_dim(others, first, size)
            return total + jnp.dot(x.T, y, precision=precision, preferred_element_type=total.dtype)

        total = jnp.zeros(
            (rows.shape[1], others.shape[1]), jnp.promote_types(rows.dtype, "float32")
        )
        total = over_blocks(block, total, blocks, start, end)
        return None, total.astype(rows.dtype)

    return jax.lax.scan(one, None, edges(sizes))[1]


def edges(sizes: Int[Array, " E"]) -> tuple[Int[Array, " E"], Int[Array, " E"]]:
    """Returns the first row of each expert, and the row after its last."""
    ends = jnp.cumsum(sizes)
    return ends - sizes, ends


def _place(begin: Array, size: int, rows: int, end: Array) -> tuple[Array, Array]:
    """Returns the first row of a block, and the mask ``(size, 1)`` of the rows that it adds.

    The last block of all may not pass the last row, so it may start before ``begin``.
    """
    first = jnp.minimum(begin, rows - size)
    row = first + jnp.arange(size)[:, None]
    return first, (row >= begin) & (row < end)


def over_blocks(
    block: Callable[[Any, Array, int, bool], Any],
    carried: Any,
    sizes: tuple[int, int],
    start: Array,
    end: Array,
) -> Any:
    """Returns ``carried`` after every block of an expert.

    ``block(carried, first row, size, whole)`` computes one; all rows of a whole block belong to the
    expert.
    """
    large, small = sizes
    whole = (end - start) // large
    rest = start + whole * large

    def with_large(number: Array, carried: Any) -> Any:
        return block(carried, start + number * large, large, True)

    def with_small(number: Array, carried: Any) -> Any:
        return block(carried, rest + number * small, small, False)

    carried = jax.lax.fori_loop(0, whole, with_large, carried)
    return jax.lax.fori_loop(0, -(-(end - rest) // small), with_small, carried)
