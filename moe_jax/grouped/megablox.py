"""Grouped products by the kernels of MegaBlocks for TPUs that JAX ships (2211.15841)."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int

# A kernel reads whole tiles of rows; 512 rows by 1,024 columns fill the vector memory of a v5p.
_ROWS, _WIDTH = 512, 1024
_LEAST = 8


def product(
    rows: Float[Array, "R M"],
    matrices: Float[Array, "E ..."],
    sizes: Int[Array, " E"],
    transposed: bool = False,
    interpret: bool = False,
) -> Float[Array, "R N"]:
    """Returns each row times the matrix of its expert; see ``moe_jax.grouped.Backend``.

    Args:
        rows: Rows ``(R, M)``.
        matrices: Matrices ``(E, M, N)``, or ``(E, N, M)`` if ``transposed``.
        sizes: Number ``(E,)`` of rows of each expert.
        transposed: True multiplies by the transposed matrices.
        interpret: True runs the kernel's program by XLA, on any device.
    """
    columns = matrices.shape[1 if transposed else 2]
    tiles = _tiles(rows.shape[0], rows.shape[1], columns)
    padded, sizes = _padded(rows, tiles[0]), sizes.astype(jnp.int32)
    y = gmm(
        padded,
        matrices,
        sizes,
        rows.dtype,
        tiles,
        transpose_rhs=transposed,
        interpret=interpret,
    )
    y = y[: rows.shape[0]]
    return jnp.where(jnp.arange(rows.shape[0])[:, None] < sizes.sum(), y, 0)


def outer(
    rows: Float[Array, "R M"],
    others: Float[Array, "R N"],
    sizes: Int[Array, " E"],
    interpret: bool = False,
) -> Float[Array, "E M N"]:
    """Returns the sums of the outer products of each expert's rows."""
    tiles = _tiles(rows.shape[0], rows.shape[1], others.shape[1])
    pad = functools.partial(_padded, tile=tiles[0])
    sizes = sizes.astype(jnp.int32)
    return tgmm(
        pad(rows).swapaxes(0, 1), pad(others), sizes, rows.dtype, tiles, interpret=interpret
    )


def _tiles(rows: int, width: int, columns: int) -> tuple[int, int, int]:
    """Returns the tile sizes of rows, of the contracted axis and of the columns."""
    least = 1 << max(rows - 1, _LEAST - 1).bit_length()
    return min(_ROWS, least), min(_WIDTH, width), min(_WIDTH, columns)


def _padded(rows: Array, tile: int) -> Array:
    return jnp.pad(rows, ((0, -rows.shape[0] % tile), (0, 0)))
