"""What training carries from step to step, and how it is made and named."""

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
    """The whole state of a run but for the position in the data.

    Attributes:
        step: batches consumed, int32.
        params: ``nnx.State`` of the trained parameters.
        router_state: ``nnx.State`` of what routers carry between steps; not optimised.
        opt_state: Optax state.
        key: raw key data of the run; step ``i`` uses ``fold_in(key, i)``.
        skipped: updates skipped so far because loss, gradient or the state after the update was
            not finite, int32.
        skipped_in_row: such updates since the last good one, int32.
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
    """Everything that determines the first state of a run.

    Attributes:
        model: the model.
        vocab_size: ``V``.
        optimizer: the Optax transformation.
        seed: of parameters and of everything random in training.
        mesh: where it lives; the values do not depend on it.
    """

    model: models.ModelConfig
    vocab_size: int
    optimizer: optax.GradientTransformation
    seed: int
    mesh: Mesh

    def _init(self, seed: int | jax.Array) -> tuple[nnx.GraphDef, TrainState]:
        key = jax.random.key(seed)
        model = models.make(self.model, self.vocab_size, jax.random.fold_in(key, 0))
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        zero = jnp.int32(0)
        run_key = jax.random.key_data(jax.random.fold_in(key, 1))
        opt_state = self.optimizer.init(params)
        return graph, TrainState(zero, params, rest, opt_state, run_key, zero, zero)

    def abstract(self) -> tuple[nnx.GraphDef, TrainState]:
        """Returns the graph definition, and the state as shapes with shardings; no memory used."""
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
        """Returns the graph definition and the first state, each array born in its sharding."""
        graph, shapes = self.abstract()
        shardings = jax.tree.map(lambda x: x.sharding, shapes)
        with jax.set_mesh(self.mesh):
            # The seed is an argument, so that runs of all seeds are one compiled program.
            init = jax.jit(lambda seed: self._init(seed)[1], out_shardings=shardings)
            return graph, init(np.uint32(self.seed))

    def create_from(
        self, change: Callable[[TrainState, Any], TrainState], weights: Any
    ) -> TrainState:
        """Returns the first state with other weights, which the optimizer then starts from.

        Args:
            change: puts weights in the place of those that were drawn.
            weights: arrays, its second argument.
        """
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract()[1])

        def init(seed: jax.Array, weights: Any) -> TrainState:
            state = change(self._init(seed)[1], weights)
            return dataclasses.replace(state, opt_state=self.optimizer.init(state.params))

        with jax.set_mesh(self.mesh):
            return jax.jit(init, out_shardings=shardings)(np.uint32(self.seed), weights)


def finite_leaves(state: Any) -> dict[str, jax.Array]:
    """Returns by name, for every array of floating-point numbers, whether all are finite."""
    return {
        name: jnp.isfinite(leaf).all()
        for name, leaf in named_leaves(state).items()
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }


def all_finite(state: Any) -> jax.Array:
    """Returns whether every floating-point number of a state is finite, a bool scalar."""
    return functools.reduce(jnp.logical_and, finite_leaves(state).values(), jnp.bool_(True))


def named_leaves(state: Any) -> dict[str, Any]:
    """Returns every array of a state under a readable name, as ``params/embedding/table``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {_name(path): leaf for path, leaf in leaves}


def from_named_leaves(like: TrainState, leaves: dict[str, Any]) -> TrainState:
    """Undoes ``named_leaves`` for a state of the structure of ``like``."""
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(structure, [leaves[_name(path)] for path, _ in paths])


def _name(path: tuple[Any, ...]) -> str:
    # The last step into an nnx.Variable says nothing; a parameter of this name does.
    if path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return "/".join(str(entry).strip("[].'") for entry in path)
