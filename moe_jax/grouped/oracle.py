"""Grouped products by ``jax.lax.ragged_dot``: every expert for every row on a CPU or a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.precision import exact

_OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def product(
    rows: Float[Array, "R M"],
    matrices: Float[Array, "E ..."],
    sizes: Int[Array, " E"],
    transposed: bool = False,
) -> Float[Array, "R N"]:
    """Returns each row times the matrix of its expert; see ``moe_jax.grouped.Backend``."""
    matrices = matrices.swapaxes(1, 2) if transposed else matrices
    y = jax.lax.ragged_dot(rows, matrices, sizes, precision=exact(rows.dtype))
    return jnp.where(jnp.arange(rows.shape[0])[:, None] < sizes.sum(), y, 0)


def outer(
    rows: Float[Array, "R M"], others: Float[Array, "R N"], sizes: Int[Array, " E"]
) -> Float[Array, "E M N"]:
    """Returns the sums of the outer products of each expert's rows."""
    return jax.lax.ragged_dot_general(rows, others, sizes, _OUTER, precision=exact(rows.dtype))
