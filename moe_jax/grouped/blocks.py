"""Grouped products as one batched product of blocks, for devices without a kernel.

The rows of an expert fill whole blocks, so that each block has one matrix (MegaBlocks, 2211.15841,
with dense blocks). Each of the ``E`` experts leaves at most one block partly empty. A block copies
its expert's matrix.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.precision import exact

_SMALLEST, _LARGEST = 8, 512


def block_size(rows: int, experts: int) -> int:
    """Returns the number of rows of a block: an expert's mean load, as a power of two.

    Small blocks need less padding, and large blocks copy an expert's matrix less often. At this
    size at most two rows are computed per row, and each matrix is copied at most twice.
    """
    even = max(rows // experts, 1)
    return min(max(1 << (even.bit_length() - 1), _SMALLEST), _LARGEST)


def product(
    rows: Float[Array, "R M"],
    matrices: Float[Array, "E ..."],
    sizes: Int[Array, " E"],
    transposed: bool = False,
) -> Float[Array, "R N"]:
    """Returns each row times the matrix of its expert; see ``moe_jax.grouped.Backend``."""
    row, owner, place = _layout(rows.shape[0], sizes)
    x = jnp.take(rows, row, axis=0, mode="fill", fill_value=0)
    form = "brm,bnm->brn" if transposed else "brm,bmn->brn"
    y = jnp.einsum(form, x, matrices[owner], precision=exact(rows.dtype))
    return jnp.take(y.reshape(-1, y.shape[-1]), place, axis=0, mode="fill", fill_value=0)


def outer(
    rows: Float[Array, "R M"], others: Float[Array, "R N"], sizes: Int[Array, " E"]
) -> Float[Array, "E M N"]:
    """Returns the sums of the outer products of each expert's rows."""
    row, owner, _ = _layout(rows.shape[0], sizes)
    x, y = (jnp.take(each, row, axis=0, mode="fill", fill_value=0) for each in (rows, others))
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    precision = exact(rows.dtype)
    parts = jnp.einsum("brm,brn->bmn", x, y, precision=precision, preferred_element_type=wide)
    sums = jax.ops.segment_sum(parts, owner, sizes.shape[0], indices_are_sorted=True)
    return sums.astype(rows.dtype)


def _layout(rows: int, sizes: Int[Array, " E"]) -> tuple[Array, Array, Array]:
    """Returns the layout of ``B`` blocks of ``S`` rows.

    Args:
        rows: ``R``.
        sizes: Number ``(E,)`` of rows of each expert.

    Returns:
        The row ``(B, S)`` in each place of a block, ``R`` where the place is empty; the expert
        ``(B,)`` of each block; and the place ``(R,)`` of each row, ``B S`` if no expert has it.
    """
    experts = sizes.shape[0]
    size = block_size(rows, experts)
    number = rows // size + experts
    used = -(-sizes // size)
    last_block, last_row = jnp.cumsum(used), jnp.cumsum(sizes)
    owner = (last_block <= jnp.arange(number)[:, None]).sum(1)
    spare = owner >= experts
    owner = jnp.minimum(owner, experts - 1)
    # An expert's first place, less its first row.
    shift = (last_block - used) * size - (last_row - sizes)
    row = jnp.arange(number)[:, None] * size + jnp.arange(size) - shift[owner][:, None]
    row = jnp.where((row < last_row[owner][:, None]) & ~spare[:, None], row, rows)
    index = jnp.arange(rows)
    of_row = (last_row <= index[:, None]).sum(1)
    place = jnp.where(of_row < experts, index + jnp.take(shift, of_row, mode="clip"), number * size)
    return row, owner, place
