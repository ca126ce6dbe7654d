"""An experiment on its devices: mesh, tokenizer, model, batches and compiled steps."""

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

from moe_jax import attend, data, processes
from moe_jax.config.experiment import Experiment
from moe_jax.errors import ConfigError
from moe_jax.nn.router import observe_top_scores
from moe_jax.parallel import make_mesh
from moe_jax.parallel.rows import fewest_parts, rows_by_process
from moe_jax.parallel.rules import spec
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.metrics import eval_means, target_means
from moe_jax.training.optimizer import optimizer_of
from moe_jax.training.state import Recipe, TrainState, split_model
from moe_jax.training.step import (
    EvalSums,
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
        experiment: Configuration of the run.
        mesh: Mesh of devices.
        tokenizer: Tokenizer of the corpus.
        optimizer: Optax transformation.
        recipe: Recipe that initialises the state.
        graph: Graph definition of the model.
        abstract: Shapes and shardings of the state.
        teacher: Model whose distribution the run learns too; ``None`` without distillation.
        first_state: Function that creates the state before step 1; ``None`` to use ``recipe``.
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
        """Indices of the batch rows that this process feeds and its devices hold, in order."""
        by_process = rows_by_process(self.mesh, self.experiment.data.batch_size)
        return np.array(by_process[jax.process_index()])

    def place(self, batch: Mapping[str, Any]) -> Batch:
        """Moves this process's rows of a batch, arrays or tuples of arrays, to its devices."""
        return jax.tree.map(self._place, dict(batch))

    def _place(self, local: np.ndarray) -> jax.Array:
        local = np.asarray(local)
        sharding = NamedSharding(self.mesh, spec("batch"))
        if jax.process_count() == 1:
            return jax.device_put(local, sharding)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # A sharding over named axes has an index for each device.
            # The rows of a device are contiguous in the batch and among this process's rows.
            start, stop, _ = index[0].indices(shape[0])
            first = np.searchsorted(self.rows, start)
            return local[first : first + stop - start]

        shape = (self.experiment.data.batch_size, *local.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    def whole(self, placed: jax.Array) -> np.ndarray:
        """Returns all rows of an array on devices, on every process."""
        if not placed.is_fully_addressable:
            placed = jax.jit(lambda x: x, out_shardings=self.everywhere)(placed)
        return np.asarray(placed)

    @property
    def everywhere(self) -> NamedSharding:
        """Sharding that replicates an array, so that every process can read it."""
        return NamedSharding(self.mesh, PartitionSpec())

    @functools.cached_property
    def train_step(self) -> Any:
        """Compiled function ``(state, batch) -> (state, StepReport)``, which donates the state."""
        objective = Objective.of(self.experiment)
        step = jit_train_step(self.graph, self.optimizer, objective, self.abstract)
        if self.teacher is None:
            return step
        return lambda state, batch: step(state, batch, self.teacher)

    @functools.cached_property
    def eval_step(self) -> Any:
        """Compiled function ``(params, router_state, batch) -> EvalSums``."""
        chunk = self.experiment.training.loss_chunk
        step = functools.partial(eval_step, self.graph, chunk)
        return jax.jit(step, out_shardings=self.everywhere)

    def eval_batches(self) -> Iterator[data.Batch]:
        """Yields this process's rows of the validation batches."""
        return data.eval_batches(self.experiment.data, self.tokenizer, rows=self.rows.tolist())

    def evaluate(self, state: TrainState) -> dict[str, Any]:
        """Returns loss, bits per byte, accuracy and load by layer on the validation set.

        Each part of a blend also has its own loss, bits per byte and accuracy, under ``parts``.
        """
        config = self.experiment.data
        sums = {name: self._sums(state, part) for name, part in config.parts.items()}
        total = functools.reduce(functools.partial(jax.tree.map, np.add), sums.values())
        means = eval_means(total, self.experiment.moe_layers)
        if config.source == data.BLEND:
            means["parts"] = {name: target_means(part) for name, part in sums.items()}
        return means

    def _sums(self, state: TrainState, config: data.DataConfig) -> EvalSums:
        """Returns the sums over the validation batches of one source."""
        total = None
        for batch in data.eval_batches(config, self.tokenizer, rows=self.rows.tolist()):
            sums = self.eval_step(state.params, state.router_state, self.place(batch))
            sums = jax.tree.map(np.float64, processes.fetch(sums))
            total = sums if total is None else jax.tree.map(np.add, total, sums)
        assert total is not None  # The validation set has at least one batch.
        return total


def attention_kernels(experiment: Experiment) -> dict[str, attend.Choice]:
    """Returns the implementation of the attention of every layer on this machine's devices.

    Raises:
        ConfigError: If ``model.attention_kernel`` names one that does not run.
    """
    model = experiment.model
    with jax.set_mesh(make_mesh(experiment.mesh)):
        return attend.check(model.attention_kernel, model.attentions())


def check_streams(experiment: Experiment) -> None:
    """Rejects a number of data streams that cannot be divided among the processes.

    Raises:
        ConfigError: If ``data.streams`` has to change; the message names a multiple that works.
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
    """Opens a session, without allocating parameters."""
    mesh = make_mesh(experiment.mesh)
    optimizer = optimizer_of(experiment)
    recipe = Recipe(
        experiment.model, tokenizer.vocab_size, optimizer, experiment.training.seed, mesh
    )
    graph, abstract = recipe.abstract()
    if any(alarm.reads_top_scores for alarm in experiment.training.alarms):
        graph = _observing(graph, abstract)
    return Session(experiment, mesh, tokenizer, optimizer, recipe, graph, abstract)


def _observing(graph: nnx.GraphDef, abstract: TrainState) -> nnx.GraphDef:
    """Returns the graph of the same model with routers that sum the shares of the top scores."""
    model = nnx.merge(graph, abstract.params, abstract.router_state)
    observe_top_scores(model)
    return split_model(model)[0]


def open_checkpoints(
    experiment: Experiment, directory: Path, *, read_only: bool = False
) -> Checkpoints:
    """Opens the checkpoints of a run; a read-only folder is sufficient with ``read_only``."""
    training = experiment.training
    return Checkpoints(
        directory,
        keep_last=training.keep_last,
        keep_every=training.keep_every or None,
        read_only=read_only,
    )
