"""Products of few rows whose matrix is the left factor, for CPUs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.precision import exact

# From this number of rows on, a product is faster with their transpose.
_TRANSPOSED = 32
# Up to this number of rows, both gradients of a product are faster in the forms used here.
_FEW = 64


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


@jax.custom_vjp
def block_product(x: Float[Array, "R M"], matrix: Float[Array, "M N"]) -> Float[Array, "R N"]:
    """Returns ``x @ matrix``, whose gradients are fast on a CPU for few rows.

    Args:
        x: Rows ``(R, M)`` of a block.
        matrix: Matrix ``(M, N)`` of an expert.
    """
    return jnp.dot(x, matrix, precision=exact(x.dtype))


def _product(x: Array, matrix: Array) -> tuple[Array, tuple[Array, Array]]:
    return block_product(x, matrix), (x, matrix)


def _gradients(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """Returns ``dy @ matrix.T`` and ``x.T @ dy``.

    The rows of ``matrix`` are the outputs of the first product, so it is the left factor. The
    barriers keep XLA from changing the products back.
    """
    x, matrix = kept
    dot = functools.partial(jnp.matmul, precision=exact(x.dtype))
    if len(x) > _FEW:
        return dot(dy, matrix.T), dot(x.T, dy)
    dx = jax.lax.optimization_barrier(dot(matrix, dy.T)).T
    return dx, dot(jax.lax.optimization_barrier(x.T), dy)


block_product.defvjp(_product, _gradients)
