"""Arrays that training leaves as they are, by the names of their leaves in a state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.config.frozen_schedules import FrozenStage
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


def frozen_now(stages: Sequence[FrozenStage], step: jax.Array) -> dict[str, jax.Array]:
    """Returns whether each leaf of some stages is frozen at a step, as bool scalars by name.

    Args:
        stages: Groups that are frozen at some steps.
        step: The step, counted from 1.
    """
    now: dict[str, jax.Array] = {}
    for stage in stages:
        holds = stage.schedule.at(step) == 1
        for leaf in sorted(stage.leaves):
            now[leaf] = now[leaf] | holds if leaf in now else holds
    return now


def kept_now(after: Tree, before: Tree, now: Mapping[str, jax.Array], field: str) -> Tree:
    """Returns ``after`` with the arrays of ``before`` that are frozen now.

    Args:
        after: Field of a state.
        before: The same field of another state.
        now: Whether each leaf is frozen, as from ``frozen_now``; other leaves are trained.
        field: Name of the field: ``params`` or ``router_state``.
    """

    def one(path: Any, new: Any, old: Any) -> Any:
        name = f"{field}/{leaf_name(path)}"
        return jnp.where(now[name], old, new) if name in now else new

    return jax.tree_util.tree_map_with_path(one, after, before) if now else after


def stopped_now(params: Tree, now: Mapping[str, jax.Array]) -> Tree:
    """Returns the parameters; a parameter that is frozen now has a gradient of zero."""
    return kept_now(params, jax.lax.stop_gradient(params), now, "params") if now else params


def paused(
    rule: optax.GradientTransformation, stages: Sequence[FrozenStage]
) -> optax.GradientTransformation:
    """Returns an update rule that rests for the parameters that are frozen now.

    Parameters of the same stages have a state of their own. While they are frozen, their updates
    are zero, and neither their moments nor the count of their updates change, so that a correction
    of bias counts the updates in which the parameters train. ``update`` takes the keyword
    ``frozen``, as from ``frozen_now``.

    Args:
        rule: Update rule.
        stages: Groups that are frozen at some steps.
    """
    leaves = {leaf for stage in stages for leaf in stage.leaves if leaf.startswith("params/")}
    label_of = {
        leaf: "_".join(["stage", *(str(n) for n, one in enumerate(stages) if leaf in one.leaves)])
        for leaf in sorted(leaves)
    }
    rules = {"trained": rule} | {name: _paused(rule, leaf) for leaf, name in label_of.items()}

    def labels(params: Any) -> Any:
        def one(path: Any, _: Any) -> str:
            return label_of.get(f"params/{leaf_name(path)}", "trained")

        return jax.tree_util.tree_map_with_path(one, params)

    return optax.partition(rules, labels)


def _paused(rule: optax.GradientTransformation, leaf: str) -> optax.GradientTransformation:
    """Returns an update rule that rests while a leaf is frozen."""
    extended = optax.with_extra_args_support(rule)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        frozen: Mapping[str, jax.Array],
        **more: Any,
    ) -> tuple[Any, Any]:
        new, after = extended.update(updates, state, params, **more)
        choose = functools.partial(jax.tree.map, functools.partial(jnp.where, frozen[leaf]))
        return choose(jax.tree.map(jnp.zeros_like, new), new), choose(state, after)

    return optax.GradientTransformationExtraArgs(rule.init, update)


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
