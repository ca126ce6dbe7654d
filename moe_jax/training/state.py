"""The training state: its initialisation and the names of its arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from moe_jax import models
from moe_jax.parallel import shardings_of_state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run, except for the position in the data.

    Attributes:
        step: Number of consumed batches, int32.
        params: Trained parameters.
        router_state: State that routers carry between steps; the optimizer does not change it.
        opt_state: Optax state.
        key: Raw key data of the run; step ``i`` uses ``fold_in(key, i)``.
        skipped: Number of skipped updates, int32. An update is skipped if loss, gradient or the
            state after the update is not finite.
        skipped_in_row: Number of skipped updates since the last applied update, int32.
    """

    step: jax.Array
    params: nnx.State
    router_state: nnx.State
    opt_state: Any
    key: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings that determine the first state of a run.

    Attributes:
        model: Configuration of the model.
        vocab_size: Size ``V`` of the vocabulary.
        optimizer: Optax transformation.
        seed: Seed of parameters and of all randomness in training.
        mesh: Mesh over which the state is sharded; the values do not depend on the mesh.
    """

    model: models.ModelConfig
    vocab_size: int
    optimizer: optax.GradientTransformation
    seed: int
    mesh: Mesh

    def _init(self, seed: int | jax.Array) -> tuple[nnx.GraphDef, TrainState]:
        key = jax.random.key(seed)
        model = models.make(self.model, self.vocab_size, jax.random.fold_in(key, 0))
        graph, params, routers = split_model(model)
        zero = jnp.int32(0)
        run_key = jax.random.key_data(jax.random.fold_in(key, 1))
        opt_state = self.optimizer.init(params)
        return graph, TrainState(zero, params, routers, opt_state, run_key, zero, zero)

    def abstract(self) -> tuple[nnx.GraphDef, TrainState]:
        """Returns the graph definition, and the shapes and shardings of the first state."""
        graphs = []

        def state_only() -> TrainState:
            graph, state = self._init(self.seed)
            graphs.append(graph)
            return state

        shapes = jax.eval_shape(state_only)
        shardings = shardings_of_state(shapes, self.mesh)
        return graphs[0], jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )

    def create(self) -> tuple[nnx.GraphDef, TrainState]:
        """Returns the graph definition and the first state, created in its shardings."""
        graph, shapes = self.abstract()
        shardings = jax.tree.map(lambda x: x.sharding, shapes)
        with jax.set_mesh(self.mesh):
            # The seed is an argument, so that runs of all seeds are one compiled program.
            init = jax.jit(lambda seed: self._init(seed)[1], out_shardings=shardings)
            return graph, init(np.uint32(self.seed))

    def create_from(
        self, change: Callable[[TrainState, Any], TrainState], weights: Any
    ) -> TrainState:
        """Returns the first state of a run that starts from other weights.

        Args:
            change: Function that replaces initialised weights of a state by ``weights``.
            weights: Arrays, the second argument of ``change``.
        """
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract()[1])

        def init(seed: jax.Array, weights: Any) -> TrainState:
            state = change(self._init(seed)[1], weights)
            return dataclasses.replace(state, opt_state=self.optimizer.init(state.params))

        with jax.set_mesh(self.mesh):
            return jax.jit(init, out_shardings=shardings)(np.uint32(self.seed), weights)


def split_model(model: Any) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Returns the graph definition, the parameters and the routers' state of a model."""
    graph, params, *rest = nnx.split(model, nnx.Param, ...)
    return graph, params, rest[0]


def finite_leaves(state: Any) -> dict[str, jax.Array]:
    """Returns for every floating-point array, by name, True if all its numbers are finite."""
    return {
        name: jnp.isfinite(leaf).all()
        for name, leaf in named_leaves(state).items()
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }


def all_finite(state: Any) -> jax.Array:
    """Returns True if every floating-point number of a state is finite, as a bool scalar."""
    return functools.reduce(jnp.logical_and, finite_leaves(state).values(), jnp.bool_(True))


def named_leaves(state: Any) -> dict[str, Any]:
    """Returns every array of a state by its name, such as ``params/embedding/table``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {leaf_name(path): leaf for path, leaf in leaves}


def from_named_leaves(like: TrainState, leaves: dict[str, Any]) -> TrainState:
    """Returns a state with the structure of ``like`` from the arrays of ``named_leaves``."""
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(structure, [leaves[leaf_name(path)] for path, _ in paths])


def leaf_name(path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf from its path in a tree."""
    # The attribute ``value`` of an nnx.Variable is no part of the name; a parameter ``value`` is.
    if path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return "/".join(str(entry).strip("[].'") for entry in path)
