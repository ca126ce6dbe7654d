"""What every command needs of a run: mesh, tokenizer, model and where batches go."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax import data, processes
from moe_jax.config.experiment import Experiment
from moe_jax.errors import ConfigError
from moe_jax.parallel import make_mesh
from moe_jax.parallel.rows import fewest_parts, rows_by_process
from moe_jax.parallel.rules import spec
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.metrics import eval_means
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import Recipe, TrainState
from moe_jax.training.step import (
    Objective,
    Teacher,
    eval_step,
    jit_train_step,
)

Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Session:
    """An experiment on its devices.

    Attributes:
        experiment: the configuration.
        mesh: the devices.
        tokenizer: of the corpus.
        optimizer: the Optax transformation.
        recipe: makes the first state.
        graph: definition of the model.
        abstract: shapes and shardings of the state.
        teacher: whose distribution is learnt too.
        first_state: makes the state before the first step; ``None`` for that of the recipe.
    """

    experiment: Experiment
    mesh: Mesh
    tokenizer: data.Tokenizer
    optimizer: optax.GradientTransformation
    recipe: Recipe
    graph: nnx.GraphDef
    abstract: TrainState
    teacher: Teacher | None = None
    first_state: Callable[[], TrainState] | None = None

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """Which rows of a batch this process feeds, in order: those that its devices hold."""
        own = rows_by_process(self.mesh, self.experiment.data.batch_size)
        return np.array(own[jax.process_index()])

    def place(self, batch: Mapping[str, Any]) -> Batch:
        """Puts this process's rows of a batch, arrays or tuples of them, onto its devices."""
        return jax.tree.map(self._place, dict(batch))

    def _place(self, local: np.ndarray) -> jax.Array:
        local = np.asarray(local)
        sharding = NamedSharding(self.mesh, spec("batch"))
        if jax.process_count() == 1:
            return jax.device_put(local, sharding)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            # A device's rows are neighbours, and so they are among this process's.
            start, stop, _ = index[0].indices(shape[0])
            first = np.searchsorted(self.rows, start)
            return local[first : first + stop - start]

        shape = (self.experiment.data.batch_size, *local.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    def whole(self, placed: jax.Array) -> np.ndarray:
        """Returns all rows of a placed array, on every process."""
        if not placed.is_fully_addressable:
            placed = jax.jit(lambda x: x, out_shardings=self.everywhere)(placed)
        return np.asarray(placed)

    @property
    def everywhere(self) -> NamedSharding:
        """Whole on every device, so that every process can read it."""
        return NamedSharding(self.mesh, PartitionSpec())

    @functools.cached_property
    def train_step(self) -> Any:
        """Compiled ``(state, batch) -> (state, StepReport)``; the state is donated."""
        objective = Objective.of(self.experiment.training)
        step = jit_train_step(self.graph, self.optimizer, objective, self.abstract)
        if self.teacher is None:
            return step
        return lambda state, batch: step(state, batch, self.teacher)

    @functools.cached_property
    def eval_step(self) -> Any:
        """Compiled ``(params, router_state, batch) -> EvalSums``."""
        chunk = self.experiment.training.loss_chunk
        step = functools.partial(eval_step, self.graph, chunk)
        return jax.jit(step, out_shardings=self.everywhere)

    def eval_batches(self) -> Iterator[data.Batch]:
        """This process's rows of the validation set."""
        return data.eval_batches(self.experiment.data, self.tokenizer, rows=self.rows)

    def evaluate(self, state: TrainState) -> dict[str, Any]:
        """Returns loss, bits per byte, accuracy and per-layer load on the validation set."""
        batches = self.eval_batches()
        total = None
        for batch in batches:
            sums = self.eval_step(state.params, state.router_state, self.place(batch))
            sums = jax.tree.map(np.float64, processes.fetch(sums))
            total = sums if total is None else jax.tree.map(np.add, total, sums)
        return eval_means(total, self.experiment.moe_layers)


def check_streams(experiment: Experiment) -> None:
    """Refuses data whose streams do not fall whole to each process.

    Raises:
        ConfigError: one line, naming the setting to change.
    """
    rows = experiment.data.batch_size
    owned = rows_by_process(make_mesh(experiment.mesh), rows)
    needed = fewest_parts(owned, rows)
    if experiment.data.streams % needed:
        raise ConfigError(
            f"data.streams={experiment.data.streams} cannot be split over {len(owned)} processes: "
            f"set it to a multiple of {needed}; the order of the data depends on it"
        )


def open_session(experiment: Experiment, tokenizer: data.Tokenizer) -> Session:
    """Prepares everything that needs no parameters in memory."""
    mesh = make_mesh(experiment.mesh)
    optimizer = make_optimizer(experiment.optimizer, experiment.training.steps)
    recipe = Recipe(
        experiment.model, tokenizer.vocab_size, optimizer, experiment.training.seed, mesh
    )
    graph, abstract = recipe.abstract()
    return Session(experiment, mesh, tokenizer, optimizer, recipe, graph, abstract)


def open_checkpoints(
    experiment: Experiment, directory: Path, *, read_only: bool = False
) -> Checkpoints:
    """Opens the checkpoints of a run; the folder need not be writable to read them."""
    training = experiment.training
    return Checkpoints(
        directory,
        keep_last=training.keep_last,
        keep_every=training.keep_every or None,
        read_only=read_only,
    )
