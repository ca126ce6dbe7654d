"""Moments of an optimizer that are shorter than their parameters, in the shapes of parameters.

Adafactor keeps the second moment of a matrix as the means of its rows and of its columns, and
``optimizer.expert_rates`` keeps one number per expert. A change of experts acts on arrays that have
the shapes of the parameters, so that these moments are written out before it and shortened after.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Leaves = Mapping[str, Any]
_PARAMS, _ROWS, _COLUMNS, _SQUARES, _USE = "params/", "/v_row/", "/v_col/", "/v/", "/tokens/"


def written_out(leaves: Leaves) -> dict[str, Any]:
    """Returns the arrays of a run's state, in which every moment has the shape of its parameter.

    Args:
        leaves: Arrays by the names of ``named_leaves``, parameters included.
    """
    found = dict(leaves)
    for prefix, param in _factored(leaves):
        rows, columns = (leaves[f"{prefix}{part}{param}"] for part in (_ROWS, _COLUMNS))
        parameter = leaves[_PARAMS + param]
        squares = _product(rows, columns, parameter.shape)
        found[f"{prefix}{_SQUARES}{param}"] = jax.device_put(squares, parameter.sharding)
    for name, param in _counted(leaves):
        use, shape = leaves[name], leaves[_PARAMS + param].shape
        prefix = name[: name.index(_USE)]
        more = (1,) * (len(shape) - len(use.shape))
        found[f"{prefix}{_USE}{param}"] = jnp.broadcast_to(use.reshape(use.shape + more), shape)
    return found


def shortened(moved: Leaves, first: Leaves, before: Leaves) -> dict[str, Any]:
    """Returns the arrays with the moments in the short form that a changed run keeps.

    A new unit, whose moment is zero, gets the mean of the other units of its expert. Moments that
    the change leaves alone keep their bits.

    Args:
        moved: Arrays as ``written_out`` has them, after the change.
        first: Arrays of the changed run's first state.
        before: Arrays of the state before the change, in the short form.
    """
    old = written_out(before)
    # A matrix that the change makes too small for factors has no rows and columns any more.
    found = dict(moved) | {n: x for n, x in first.items() if _ROWS in n or _COLUMNS in n}
    for prefix, param in _factored(first):
        name = f"{prefix}{_SQUARES}{param}"
        if name in moved:
            parts = f"{prefix}{_ROWS}{param}", f"{prefix}{_COLUMNS}{param}"
            stays = name in old and np.array_equal(moved[name], old[name])
            means = [before[part] for part in parts] if stays else _means(moved[name])
            found |= {**dict(zip(parts, means, strict=True)), name: first[name]}
    for name, param in _counted(first):
        array = moved.get(f"{name[: name.index(_USE)]}{_USE}{param}")
        if array is not None:
            found[name] = array.max(tuple(range(first[name].ndim, array.ndim)))
    return found


def _factored(leaves: Leaves) -> Iterator[tuple[str, str]]:
    """Yields the prefix and the name of each parameter whose second moment is factored."""
    for name in leaves:
        prefix, rows, param = name.partition(_ROWS)
        if rows and leaves[f"{prefix}{_SQUARES}{param}"].shape != leaves[_PARAMS + param].shape:
            yield prefix, param


def _counted(leaves: Leaves) -> Iterator[tuple[str, str]]:
    """Yields the name of each array of use, and one parameter of its experts.

    Experts of several widths have several parameters for one array, and are left out.
    """
    for name, use in leaves.items():
        _, counts, layer = name.partition(_USE)
        start = f"{_PARAMS}{layer}/experts/"
        own = [n for n in leaves if counts and n.startswith(start) and "/groups/" not in n]
        whole = [n for n in own if leaves[n].shape[: use.ndim] == use.shape]
        if whole:
            yield name, min(whole).removeprefix(_PARAMS)


def _axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the axis that columns lack and the one that rows lack, as Optax chooses them."""
    second, largest = np.argsort(shape)[-2:]
    return int(second), int(largest)


def _product(
    rows: Float[Array, "*rows"], columns: Float[Array, "*columns"], shape: tuple[int, ...]
) -> Float[Array, "*shape"]:
    """Returns the second moment that Adafactor reads from the means of rows and of columns."""
    second, largest = _axes(shape)
    mean = rows.mean(second - (second > largest), keepdims=True)
    share = jnp.where(mean > 0, rows / jnp.where(mean > 0, mean, 1), 0)
    return jnp.expand_dims(share, largest) * jnp.expand_dims(columns, second)


def _means(
    squares: Float[Array, "*shape"],
) -> tuple[Float[Array, "*rows"], Float[Array, "*columns"]]:
    """Returns the means of rows and of columns; zeros count as the mean of their matrix."""
    second, largest = _axes(squares.shape)
    known = (squares > 0).sum((-2, -1), keepdims=True)
    mean = squares.sum((-2, -1), keepdims=True) / jnp.maximum(known, 1)
    filled = jnp.where(squares > 0, squares, mean)
    return filled.mean(largest), filled.mean(second)
