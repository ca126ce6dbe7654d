"""Grouped products by the kernels of tokamax for NVIDIA GPUs (https://github.com/openxla/tokamax).

Mosaic serves Hopper and later, Triton serves Ampere. Where tokamax is not installed or rejects a
device, a type or a shape, blocks serve instead and a warning says why. These kernels have not been
run on a device yet.
"""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.grouped import blocks

_KERNELS = ("mosaic", "triton")
_REJECTED = (ImportError, NotImplementedError, ExceptionGroup)


def product(
    rows: Float[Array, "R M"],
    matrices: Float[Array, "E ..."],
    sizes: Int[Array, " E"],
    transposed: bool = False,
) -> Float[Array, "R N"]:
    """Returns each row times the matrix of its expert; see ``moe_jax.grouped.Backend``."""
    try:
        y = _ragged_dot(rows, matrices.swapaxes(1, 2) if transposed else matrices, sizes)
    except _REJECTED as error:
        _warn(error)
        return blocks.product(rows, matrices, sizes, transposed)
    return jnp.where(jnp.arange(rows.shape[0])[:, None] < sizes.sum(), y, 0)


def outer(
    rows: Float[Array, "R M"], others: Float[Array, "R N"], sizes: Int[Array, " E"]
) -> Float[Array, "E M N"]:
    """Returns the sums of the outer products of each expert's rows."""
    unused = jnp.zeros((sizes.shape[0], rows.shape[1], others.shape[1]), rows.dtype)
    try:
        _, pull = jax.vjp(functools.partial(_ragged_dot, rows, sizes=sizes), unused)
        return pull(others)[0]
    except _REJECTED as error:
        _warn(error)
        return blocks.outer(rows, others, sizes)


def _warn(error: Exception) -> None:
    """Warns that blocks, which are slower, compute a product."""
    why = f"{type(error).__name__}: {error}"
    warnings.warn(f"blocks replace the kernels of tokamax in grouped products: {why}", stacklevel=2)


def _ragged_dot(rows: Array, matrices: Array, sizes: Array) -> Array:
    import tokamax

    return tokamax.ragged_dot(
        rows, matrices, sizes, preferred_element_type=rows.dtype, implementation=_KERNELS
    )
