"""An exchange of rows between the devices of the expert axis, in parts of unequal lengths."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.parallel.rules import platform


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def exchange_rows(
    rows: Float[Array, "R M"], sizes: Int[Array, "D D"], length: int
) -> Float[Array, "T M"]:
    """Sends consecutive rows to the devices of the expert axis, inside ``shard_map``.

    The rows for device 0 come first, then the rows for device 1, and so on. The received rows are
    in the order of the devices that sent them. The gradient travels the same way back.

    Args:
        rows: Rows ``(R, M)`` of this device.
        sizes: Numbers ``(D, D)`` of rows that each device (first axis) sends to each device, equal
            on all devices.
        length: ``T``, at least the number of rows that any device receives.

    Returns:
        The received rows ``(T, M)``, followed by zeros.
    """
    on_cpu = platform() == "cpu"
    return (_by_padding if on_cpu else _by_collective)(rows, sizes, length)


def _forward(rows: Array, sizes: Array, length: int) -> tuple[Array, Any]:
    return exchange_rows(rows, sizes, length), (sizes, jnp.zeros((len(rows), 0)))


def _backward(length: int, residuals: Any, gradient: Array) -> tuple[Array, None]:
    sizes, like = residuals
    return exchange_rows(gradient, sizes.T, len(like)), None


exchange_rows.defvjp(_forward, _backward)


def _by_collective(rows: Array, sizes: Array, length: int) -> Array:
    """The exchange by ``jax.lax.ragged_all_to_all``, which CPUs do not have."""
    me = jax.lax.axis_index("expert")
    received = jnp.zeros((length, rows.shape[1]), rows.dtype)
    return jax.lax.ragged_all_to_all(
        rows,
        received,
        _starts(sizes, 1)[me],
        sizes[me],
        _starts(sizes, 0)[me],
        sizes[:, me],
        axis_name="expert",
    )


def _by_padding(rows: Array, sizes: Array, length: int) -> Array:
    """The exchange by an ``all_to_all`` of parts that are all padded to ``R`` rows."""
    me, row = jax.lax.axis_index("expert"), jnp.arange(len(rows))
    taken = _rows_of(_starts(sizes, 1)[me], sizes[me], row, len(rows))
    parts = jnp.take(rows, taken, axis=0, mode="fill", fill_value=0)
    parts = jax.lax.all_to_all(parts, "expert", split_axis=0, concat_axis=0)
    placed = _rows_of(_starts(sizes, 0)[:, me], sizes[:, me], row, length)
    received = jnp.zeros((length, rows.shape[1]), rows.dtype)
    flat = parts.reshape(-1, rows.shape[1])
    return received.at[placed.reshape(-1)].set(flat, mode="drop")


def _starts(sizes: Array, axis: int) -> Array:
    """Returns the sums of all earlier sizes along an axis."""
    return jnp.cumsum(sizes, axis) - sizes


def _rows_of(starts: Array, sizes: Array, row: Array, outside: int) -> Array:
    """Returns the indices ``(D, R)`` of the rows of each part; ``outside`` after its last row."""
    return jnp.where(row < sizes[:, None], starts[:, None] + row, outside)
