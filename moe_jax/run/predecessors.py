"""Another run that has ended: what a new one starts from, or learns from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from moe_jax import data
from moe_jax.config.experiment import Experiment
from moe_jax.errors import ConfigError
from moe_jax.interop import folders
from moe_jax.models import ModelConfig
from moe_jax.routing import Forced
from moe_jax.run import workdir
from moe_jax.run.released import Released, is_released, open_released, remember, remembered
from moe_jax.run.session import Session
from moe_jax.training.checkpoint import Checkpoints, identity, latest_step
from moe_jax.training.state import Recipe, TrainState, from_named_leaves, named_leaves
from moe_jax.training.step import Teacher
from moe_jax.training.transplant import WEIGHTS, Transplant, check_all, shared, weight_shapes


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished run.

    Attributes:
        setting: that names it, such as ``training.teacher``.
        folder: its workdir.
        experiment: its configuration.
        tokenizer: its tokenizer.
    """

    setting: str
    folder: Path
    experiment: Experiment
    tokenizer: data.Tokenizer

    @property
    def identity(self) -> str:
        """Names its weights by their content."""
        return identity(self.folder / workdir.CHECKPOINTS)

    def keep(self, folder: Path) -> None:
        """Hands the family that it started from on to the run in ``folder``."""
        known = remembered(self.folder)
        if known:
            remember(folder, known["family"], known["original"], self.folder, adopts=False)

    def abstract(self, mesh: Mesh) -> tuple[nnx.GraphDef, TrainState]:
        """Returns its model and its state without an optimizer, as shapes with shardings."""
        model, seed = self.experiment.model, self.experiment.training.seed
        return Recipe(model, self.tokenizer.vocab_size, optax.identity(), seed, mesh).abstract()

    def weights(self, mesh: Mesh) -> tuple[nnx.GraphDef, TrainState]:
        """Returns its model, and its state in which parameters and routers' state are loaded.

        Raises:
            CheckpointError: if no checkpoint is intact.
        """
        graph, abstract = self.abstract(mesh)
        leaves = named_leaves(abstract)
        wanted = {name: leaf for name, leaf in leaves.items() if name.startswith(WEIGHTS)}
        with Checkpoints(self.folder / workdir.CHECKPOINTS, read_only=True) as checkpoints:
            found = checkpoints.restore(wanted, partial=True)
        assert found is not None  # ``open_finished`` has seen one
        return graph, from_named_leaves(abstract, leaves | found[1])


@dataclasses.dataclass(frozen=True)
class Sources:
    """The finished runs that a new one needs.

    Attributes:
        start: whose weights it starts from, unless it has begun.
        teacher: whose distribution it learns.
    """

    start: Finished | Released | None = None
    teacher: Finished | None = None

    @property
    def identities(self) -> dict[str, str]:
        """What names the weights of each, by setting."""
        return {run.setting: run.identity for run in (self.start, self.teacher) if run}

    @property
    def tokenizer(self) -> data.Tokenizer | None:
        """The tokenizer of both, or ``None`` without any."""
        found = [run.tokenizer for run in (self.start, self.teacher) if run and run.tokenizer]
        return found[0] if found else None

    @property
    def rows(self) -> int:
        """Rows of the embedding of a released model to start from; 0 without one."""
        return self.start.found.vocab_size if isinstance(self.start, Released) else 0

    def keep(self, folder: Path) -> None:
        """Writes into a workdir which family its model is of, if it starts from one."""
        if self.start:
            self.start.keep(folder)

    def joined(self, session: Session) -> Session:
        """Returns the session with its teacher loaded, and its first state made from the start."""
        teacher = self.teacher and _teacher(self.teacher, session.mesh)
        first = None if self.start is None else (lambda: _first_state(session, self.start))
        return dataclasses.replace(session, teacher=teacher, first_state=first)


def open_sources(experiment: Experiment, folder: Path) -> Sources:
    """Returns the finished runs that a run in ``folder`` needs now, checked against it.

    Once it has a checkpoint it needs no weights to start from, and nothing once it is finished.

    Raises:
        ConfigError: one line, if one of them is not finished, or does not fit.
    """
    training = experiment.training
    begun = latest_step(folder / workdir.CHECKPOINTS) is not None
    if (folder / workdir.RESULT).exists():
        return Sources()
    start = teacher = None
    if training.start_from and not begun:
        start = _open_start(experiment)
    if training.teacher:
        teacher = open_finished("training.teacher", training.teacher)
        _check_tokenizer(experiment, teacher, teacher.experiment.data)
        _check_teacher(experiment, teacher)
    both = start and teacher and start.tokenizer
    if both and not data.same_tokenizer(start.tokenizer, teacher.tokenizer):
        raise ConfigError(
            f"training.start_from={start.folder} and training.teacher={teacher.folder} have "
            "different tokenizers: use runs of one tokenizer"
        )
    return Sources(start, teacher)


def open_finished(setting: str, folder: str) -> Finished:
    """Opens a finished run for reading; nothing is loaded.

    Raises:
        ConfigError: if the folder holds no run, or one that is not finished.
    """
    path = Path(folder)
    try:
        experiment = workdir.load(path)
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from error
    ended = (path / workdir.RESULT).exists()
    if not ended or latest_step(path / workdir.CHECKPOINTS) is None:
        raise ConfigError(f"{setting}={folder} is not finished: train it to its end first")
    try:
        tokenizer = data.load_tokenizer(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}={folder}: its tokenizer cannot be read: {error}") from error
    return Finished(setting, path, experiment, tokenizer)


def _open_start(experiment: Experiment) -> Finished | Released:
    setting, folder = "training.start_from", experiment.training.start_from
    if is_released(folder):
        start = open_released(folder, experiment)
        theirs = data.DataConfig(tokenizer=folders.tokenizer_of(folder))
        _check_weights(experiment, start.found.config, f"{setting}={folder}", 8)
    else:
        start = open_finished(setting, folder)
        theirs, size = start.experiment.data, start.tokenizer.vocab_size
        _check_weights(experiment, start.experiment.model, f"{setting}={folder}", size)
    if start.tokenizer:
        _check_tokenizer(experiment, start, theirs)
    return start


def _check_tokenizer(
    experiment: Experiment, run: Finished | Released, theirs: data.DataConfig
) -> None:
    reason = data.contradiction(experiment.data, theirs, run.tokenizer)
    if reason:
        raise ConfigError(f"{run.setting}={run.folder} has another tokenizer: {reason}")


def _check_weights(
    experiment: Experiment, model: ModelConfig, source: str, vocab_size: int
) -> None:
    """Refuses weights of another model, whatever rows the two embeddings have."""
    new, old = (weight_shapes(one, vocab_size) for one in (experiment.model, model))
    if experiment.training.start_with == "all":
        check_all(new, old, source)
    elif not shared(new, old):
        raise ConfigError(f"{source} shares no weights with this model")


def _check_teacher(experiment: Experiment, run: Finished) -> None:
    model = run.experiment.model
    if type(model) is not type(experiment.model):
        raise ConfigError(
            f"{run.setting}={run.folder} is a {type(model).__name__}, and this model is not: use a "
            "teacher of the same kind"
        )
    if any(isinstance(layer.moe.router.select, Forced) for layer in model.sparse_layers()):
        raise ConfigError(
            f"{run.setting}={run.folder} repeats a recorded routing, which these tokens do not have"
        )
    try:
        dataclasses.replace(experiment, model=model).check_program(jax.device_count())
    except ConfigError as error:
        raise ConfigError(f"{run.setting}={run.folder}: {error}") from error


def _teacher(run: Finished, mesh: Mesh) -> Teacher:
    graph, state = run.weights(mesh)
    return Teacher(graph, state.params, state.router_state)


def _first_state(session: Session, run: Finished | Released) -> TrainState:
    if isinstance(run, Released):
        model, source = run.found.config, run.weights(session.mesh)
    else:
        model, (_, state) = run.experiment.model, run.weights(session.mesh)
        source = {n: x for n, x in named_leaves(state).items() if n.startswith(WEIGHTS)}
    only = session.experiment.training.start_with == "shared"
    change = Transplant(only, session.experiment.model, model)
    return session.recipe.create_from(change, source)
