"""Quantiles over all tokens of a step, from counts that add up over groups and devices."""

from __future__ import annotations

from typing import Annotated

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from moe_jax.ranges import Range

Edges = Annotated[int, Range(8, 4096)]

# Bins within this distance of 0 are equally wide; further bins widen in proportion to it.
_FINE = 1e-4
_LARGEST = 4.0


def widening_edges(number: int) -> Float[np.ndarray, " B"]:
    """Returns edges from -4 to 4 that are dense around 0 and wider apart in proportion to it."""
    reach = np.log1p(_LARGEST / _FINE)
    steps = np.linspace(-reach, reach, number)
    return (np.sign(steps) * _FINE * np.expm1(np.abs(steps))).astype(np.float32)


def counts_above(
    values: Float[Array, "S E"], valid: Bool[Array, " S"], edges: Float[np.ndarray, " B"]
) -> Float[Array, "E B"]:
    """Returns the number ``(E, B)`` of valid tokens whose value is at or above each edge."""
    above = (values[..., None] >= edges) & valid[:, None, None]
    return above.sum(0).astype(jnp.float32)


def cut(
    above: Float[Array, "*layers E B"],
    number: Float[Array, "*layers #E"],
    tokens: Float[Array, "*layers"],
    edges: Float[np.ndarray, " B"],
) -> Float[Array, "*layers E"]:
    """Returns the value ``(..., E)`` that ``number`` tokens of a step exceed; see ``quantile``.

    A step without tokens has the value 0, so that it moves no state.
    """
    return jnp.where(tokens[..., None] > 0, quantile(above, number, edges), 0)


def quantile(
    above: Float[Array, "*layers E B"],
    number: Float[Array, "*layers #E"],
    edges: Float[np.ndarray, " B"],
) -> Float[Array, "*layers E"]:
    """Returns the value ``(..., E)`` that ``number`` tokens exceed.

    The value is interpolated between two edges; it is the first or the last edge if all or no
    values between them exceed it.

    Args:
        above: Counts from ``counts_above``, which fall along the edges.
        number: Number of tokens above the value.
        edges: The edges ``(B,)``.
    """
    place = (above >= number[..., None]).sum(-1)
    low = jnp.clip(place - 1, 0, len(edges) - 2)

    def at(index: Array) -> Array:
        return jnp.take_along_axis(above, index[..., None], axis=-1)[..., 0]

    table, fewer, more = jnp.asarray(edges), at(low + 1), at(low)
    share = jnp.clip((more - number) / jnp.maximum(more - fewer, 1), 0, 1)
    between = table[low] + share * (table[low + 1] - table[low])
    return jnp.where(place == 0, table[0], between)
