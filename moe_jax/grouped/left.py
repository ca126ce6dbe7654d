"""A product of few rows whose matrix is the left factor, for CPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.precision import exact

# From this number of rows on, a product is faster with their transpose.
_TRANSPOSED = 32


def product_by_rows(matrix: Float[Array, "N M"], x: Float[Array, "R M"]) -> Float[Array, "R N"]:
    """Returns ``x @ matrix.T``, which maps ``M`` features to ``N``.

    On a CPU the matrix as left factor is faster, and with many rows also the transpose of the other
    factor. Without the barriers XLA would change both back.

    Args:
        matrix: Matrix ``(N, M)``, its outputs first.
        x: Rows ``(R, M)``.
    """
    if len(x) < _TRANSPOSED:
        y = jnp.einsum("nm,rm->nr", matrix, x, precision=exact(x.dtype))
    else:
        y = jnp.matmul(matrix, jax.lax.optimization_barrier(x.T), precision=exact(x.dtype))
    return jax.lax.optimization_barrier(y).T
