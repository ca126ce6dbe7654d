"""Arrays that training leaves as they are, by the names of their leaves in a state."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeVar

import jax
import optax

from moe_jax.training.state import leaf_name

Tree = TypeVar("Tree")


def stopped(params: Tree, frozen: Collection[str]) -> Tree:
    """Returns parameters with gradients of zero for the frozen ones.

    Args:
        params: Parameters of a state.
        frozen: Names of leaves of the state, such as ``params/embedding/table``.
    """
    return kept(params, jax.lax.stop_gradient(params), frozen, "params") if frozen else params


def kept(after: Tree, before: Tree, frozen: Collection[str], field: str) -> Tree:
    """Returns ``after`` with the frozen arrays of ``before``.

    Args:
        after: Field of a state.
        before: The same field of another state.
        frozen: Names of leaves of the state.
        field: Name of the field: ``params`` or ``router_state``.
    """

    def one(path: Any, new: Any, old: Any) -> Any:
        return old if f"{field}/{leaf_name(path)}" in frozen else new

    return jax.tree_util.tree_map_with_path(one, after, before)


def trained_only(
    optimizer: optax.GradientTransformation, frozen: Collection[str]
) -> optax.GradientTransformation:
    """Returns an optimizer that neither sees nor keeps state for the frozen parameters."""

    def labels(params: Any) -> Any:
        trained = jax.tree.map(lambda _: "trained", params)
        return kept(trained, jax.tree.map(lambda _: "frozen", params), frozen, "params")

    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)
