"""Arrays in a checkpoint beside the arrays of a model: names, types, leading axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import tree as ocp_tree

from moe_jax.errors import CheckpointError
from moe_jax.models.leading_axis import as_saved

PyTree = Any


def with_saved_axes(like: PyTree, saved: Mapping[str, Any]) -> PyTree:
    """Returns ``like`` with a leading axis on the arrays that were saved with one."""

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        array = saved.get(_name(path))
        return as_saved(leaf, None if array is None else np.shape(array))

    return jax.tree_util.tree_map_with_path(one, like)


def require_same_parameters(
    path: epath.Path, saved: Mapping[str, Any], like: PyTree, partial: bool
) -> None:
    """Rejects a checkpoint with other parameters than ``like``.

    Raises:
        CheckpointError: If a parameter differs; the message names the first one.
    """
    actual = _types(saved)
    expected = _types(named(like))
    remedy = "use the configuration it was trained with, or another directory"
    for name in expected if partial else (*expected, *actual):
        if expected.get(name) != actual.get(name):
            raise CheckpointError(
                f"checkpoint {path} is of another model: {name} is {actual.get(name, 'absent')} "
                f"in the checkpoint and {expected.get(name, 'absent')} in the model; {remedy}"
            )


def named(tree: PyTree) -> dict[str, Any]:
    """Returns every array of ``tree`` by name."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: Any) -> str:
    return "/".join(ocp_tree.str_keypath(path))


def _types(named: Mapping[str, Any]) -> dict[str, str]:
    """Returns the type of each array, such as ``float32[8,4]``."""
    return {name: _array_type(leaf) for name, leaf in named.items()}


def _array_type(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        # Orbax stores the words of a typed key, and its metadata describe the words.
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, dtype))
        dtype = leaf.dtype
    return f"{dtype or type(leaf).__name__}[{','.join(map(str, np.shape(leaf)))}]"
