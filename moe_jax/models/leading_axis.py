"""Reads arrays that were saved when layers outside a scan still had a leading axis of length 1.

Every array of such a layer, and of its optimizer statistics, was saved as ``(1, ...)`` and is now
``(...)``. The values are equal, so a reader restores an array as it was saved and removes the axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def as_saved(wanted: jax.ShapeDtypeStruct, saved: Sequence[int] | None) -> jax.ShapeDtypeStruct:
    """Returns the shape with which to restore an array: ``wanted``, or ``(1, *wanted)``.

    Args:
        wanted: Shape, type and sharding of the array in the model.
        saved: Shape of the array in the file; ``None`` if the file lacks the array.
    """
    if saved is None or tuple(saved) != (1, *wanted.shape):
        return wanted
    sharding = wanted.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return jax.ShapeDtypeStruct(tuple(saved), wanted.dtype, sharding=sharding)


def as_wanted(restored: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Returns an array that was restored as ``as_saved`` says, in the wanted shape and sharding.

    A restored array that loses its axis is freed, so that a large state is never in memory twice.
    """
    if np.shape(restored) == wanted.shape:
        return restored
    array = jax.jit(_first, out_shardings=wanted.sharding)(restored)
    restored.delete()
    return array


def _first(array: jax.Array) -> jax.Array:
    return array[0]
