"""Arrays that training leaves as they are, by the names of their leaves in a state."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.config.optimizer import map_variables
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


def stopped_experts(params: Tree, first: int) -> Tree:
    """Returns parameters in which the ``first`` experts of every layer have gradients of zero."""
    return _with_first(params, first, jax.lax.stop_gradient) if first else params


def fixed_experts(first: int) -> optax.GradientTransformation:
    """Returns a transformation whose updates of the ``first`` experts of every layer are zero."""
    return optax.stateless(lambda updates, _: _with_first(updates, first, jnp.zeros_like))


def _with_first(tree: Tree, first: int, change: Callable[[jax.Array], jax.Array]) -> Tree:
    """Returns a tree in which the arrays of the first experts are changed."""

    def one(variable: nnx.Variable) -> nnx.Variable:
        axes, value = variable.get_metadata()["axes"], variable.get_value()
        if "expert" not in axes or isinstance(value, optax.MaskedNode):
            return variable
        # Scans add leading axes.
        place = value.ndim - len(axes) + axes.index("expert")
        fixed = jnp.arange(value.shape[place]) < first
        fixed = fixed.reshape(-1, *(1,) * (value.ndim - place - 1))
        return variable.replace(jnp.where(fixed, change(value), value))

    return map_variables(one, tree)


def trained_only(
    optimizer: optax.GradientTransformation, frozen: Collection[str]
) -> optax.GradientTransformation:
    """Returns an optimizer that neither sees nor keeps state for the frozen parameters."""

    def labels(params: Any) -> Any:
        trained = jax.tree.map(lambda _: "trained", params)
        return kept(trained, jax.tree.map(lambda _: "frozen", params), frozen, "params")

    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)
