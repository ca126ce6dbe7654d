"""Opens the finished runs that a new run starts from, or distils."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from moe_jax import data
from moe_jax.config.experiment import Experiment
from moe_jax.config.routing_groups import check_routing
from moe_jax.errors import ConfigError
from moe_jax.interop import folders
from moe_jax.models import ModelConfig
from moe_jax.models.adapters import check_merged
from moe_jax.routing import Forced
from moe_jax.run import workdir
from moe_jax.run.released import Released, is_released, open_released, remember, remembered
from moe_jax.run.session import Session
from moe_jax.training.average import averaged_names
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.optimizer import optimizer_of
from moe_jax.training.state import Recipe, TrainState, from_named_leaves, named_leaves
from moe_jax.training.step import Teacher
from moe_jax.training.step_folders import identity, latest_step
from moe_jax.training.transplant import WEIGHTS, Transplant, check_all, shared, weight_shapes


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        setting: Setting of the new run that names this run, such as ``training.teacher``.
        folder: Workdir of this run.
        experiment: Configuration of this run.
        tokenizer: Tokenizer of this run.
    """

    setting: str
    folder: Path
    experiment: Experiment
    tokenizer: data.Tokenizer

    @property
    def identity(self) -> str:
        """Content hash of the run's checkpoints."""
        return identity(self.folder / workdir.CHECKPOINTS)

    def keep(self, folder: Path) -> None:
        """Copies the family of the released model that this run started from to ``folder``."""
        known = remembered(self.folder)
        if known:
            remember(folder, known["family"], known["original"], self.folder, adopts=False)

    def abstract(self, mesh: Mesh) -> tuple[nnx.GraphDef, TrainState]:
        """Returns the model and the state, as shapes with shardings."""
        experiment = self.experiment
        training = experiment.training
        optimizer = optimizer_of(experiment)
        size = self.tokenizer.vocab_size
        return Recipe(experiment.model, size, optimizer, training.seed, mesh).abstract()

    def weights(
        self, mesh: Mesh, step: int | None = None, *, average: bool = True
    ) -> tuple[nnx.GraphDef, TrainState]:
        """Returns the model, and the state with loaded parameters and router state.

        The optimizer is not loaded.

        Args:
            mesh: Mesh of devices.
            step: Step of the checkpoint; ``None`` for the newest intact one.
            average: True loads the averaged parameters of a run that keeps an average of them.

        Raises:
            CheckpointError: If no checkpoint is intact, or the one of ``step`` is not.
        """
        graph, abstract = self.abstract(mesh)
        leaves = named_leaves(abstract)
        read = averaged_names(leaves) if average else {name: name for name in leaves}
        stored = {name: of for name, of in read.items() if name.startswith(WEIGHTS)}
        wanted = {of: leaves[name] for name, of in stored.items()}
        with Checkpoints(self.folder / workdir.CHECKPOINTS, read_only=True) as checkpoints:
            found = checkpoints.restore(wanted, partial=True, step=step)
        assert found is not None  # ``open_finished`` has checked that a checkpoint exists.
        weights = {name: found[1][of] for name, of in stored.items()}
        return graph, from_named_leaves(abstract, leaves | weights)


def abstract_weights(experiment: Experiment, vocab_size: int, mesh: Mesh) -> dict[str, Any]:
    """Returns the shapes of parameters and router state by the names of a checkpoint."""
    model, seed = experiment.model, experiment.training.seed
    state = Recipe(model, vocab_size, optax.identity(), seed, mesh).abstract()[1]
    return {name: leaf for name, leaf in named_leaves(state).items() if name.startswith(WEIGHTS)}


@dataclasses.dataclass(frozen=True)
class Sources:
    """Finished runs and released models that a new run needs.

    Attributes:
        start: Run or released model with the first weights; ``None`` once the new run has a
            checkpoint.
        teacher: Run or released model whose distribution the new run learns.
    """

    start: FinishedRun | Released | None = None
    teacher: FinishedRun | Released | None = None

    @property
    def identities(self) -> dict[str, str]:
        """Content hash of the weights of each source, by setting."""
        return {run.setting: run.identity for run in (self.start, self.teacher) if run}

    @property
    def tokenizer(self) -> data.Tokenizer | None:
        """Tokenizer of the sources, or ``None`` if none has a tokenizer."""
        found = [run.tokenizer for run in (self.start, self.teacher) if run and run.tokenizer]
        return found[0] if found else None

    @property
    def rows(self) -> int:
        """Largest number of embedding rows of the released models; 0 without such a model."""
        both = (self.start, self.teacher)
        return max((one.found.vocab_size for one in both if isinstance(one, Released)), default=0)

    def keep(self, folder: Path) -> None:
        """Writes the family of the start model, if it has one, into the workdir ``folder``."""
        if self.start:
            self.start.keep(folder)

    def joined(self, session: Session) -> Session:
        """Returns the session with the loaded teacher and the first state."""
        start = self.start
        teacher = None if self.teacher is None else _teacher(self.teacher, session)
        first = None if start is None else (lambda: _first_state(session, start))
        return dataclasses.replace(session, teacher=teacher, first_state=first)


def open_sources(experiment: Experiment, folder: Path) -> Sources:
    """Returns the sources that a run in ``folder`` still needs, checked against its configuration.

    A run with a checkpoint needs no start weights.

    Raises:
        ConfigError: If a source is unfinished or does not fit the configuration.
    """
    training = experiment.training
    begun = latest_step(folder / workdir.CHECKPOINTS) is not None
    start = _open_start(experiment) if training.start_from and not begun else None
    if not training.teacher:
        return Sources(start)
    teacher = _open_teacher(experiment)
    _check_teacher(experiment, teacher)
    _check_one_tokenizer(start, teacher)
    return Sources(start, teacher)


def check_teacher(experiment: Experiment) -> None:
    """Rejects a teacher that is unfinished or does not fit the configuration; ``""`` is none.

    Raises:
        ConfigError: If so.
    """
    if experiment.training.teacher:
        _check_teacher(experiment, _open_teacher(experiment))


def open_finished(setting: str, folder: str) -> FinishedRun:
    """Opens a finished run for reading, without loading weights.

    A run at step 0 that a change of a trained model has written is finished too.

    Raises:
        ConfigError: If the folder holds no run, or an unfinished run.
    """
    path = Path(folder)
    try:
        experiment = workdir.load(path)
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from error
    step = latest_step(path / workdir.CHECKPOINTS)
    written = step == 0  # Training saves no step 0.
    if step is None or not (written or (path / workdir.RESULT).exists()):
        raise ConfigError(f"{setting}={folder} is not finished: train it to its end first")
    try:
        tokenizer = data.load_tokenizer(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}={folder}: its tokenizer cannot be read: {error}") from error
    return FinishedRun(setting, path, experiment, tokenizer)


def _open_start(experiment: Experiment) -> FinishedRun | Released:
    setting, folder = "training.start_from", experiment.training.start_from
    if is_released(folder):
        released = open_released(folder, experiment)
        theirs = data.DataConfig(tokenizer=folders.tokenizer_of(folder))
        check_weights(experiment, released.found.config, f"{setting}={folder}", 8)
        _check_tokenizer(experiment, released, theirs)
        return released
    run = open_finished(setting, folder)
    size = run.tokenizer.vocab_size
    check_weights(experiment, run.experiment.model, f"{setting}={folder}", size)
    _check_tokenizer(experiment, run, run.experiment.data)
    return run


def _open_teacher(experiment: Experiment) -> FinishedRun | Released:
    setting, folder = "training.teacher", experiment.training.teacher
    if not is_released(folder):
        run = open_finished(setting, folder)
        _check_tokenizer(experiment, run, run.experiment.data)
        return run
    released = dataclasses.replace(open_released(folder, experiment), setting=setting)
    if released.tokenizer is None:
        raise ConfigError(f"{setting}={folder} has no tokenizer: copy its tokenizer.json into it")
    theirs = data.DataConfig(tokenizer=folders.tokenizer_of(folder))
    _check_tokenizer(experiment, released, theirs)
    return released


def _check_one_tokenizer(
    start: FinishedRun | Released | None, teacher: FinishedRun | Released
) -> None:
    if start is None or start.tokenizer is None or teacher.tokenizer is None:
        return
    if not data.same_tokenizer(start.tokenizer, teacher.tokenizer):
        raise ConfigError(
            f"training.start_from={start.folder} and training.teacher={teacher.folder} have "
            "different tokenizers: use runs of one tokenizer"
        )


def _check_tokenizer(
    experiment: Experiment, run: FinishedRun | Released, theirs: data.DataConfig
) -> None:
    """Rejects a source whose tokenizer contradicts the settings; a source may have none."""
    if run.tokenizer is None:
        return
    reason = data.contradiction(experiment.data, theirs, run.tokenizer)
    if reason:
        raise ConfigError(f"{run.setting}={run.folder} has another tokenizer: {reason}")


def check_weights(experiment: Experiment, model: ModelConfig, source: str, vocab_size: int) -> None:
    """Rejects weights of another model; the number of embedding rows may differ.

    Args:
        experiment: Configuration of the run that starts from the weights.
        model: Model of the weights.
        source: Name of the weights, for messages.
        vocab_size: Number of embedding rows of both models.

    Raises:
        ConfigError: If an array differs, or no array is shared with ``start_with=shared``.
    """
    check_merged(model, source)
    new, old = (
        weight_shapes(dataclasses.replace(one, lora=None), vocab_size)
        for one in (experiment.model, model)
    )
    if experiment.training.start_with == "all":
        check_all(new, old, source)
    elif not shared(new, old):
        raise ConfigError(f"{source} shares no weights with this model")


def _check_teacher(experiment: Experiment, run: FinishedRun | Released) -> None:
    model = run.found.config if isinstance(run, Released) else run.experiment.model
    if type(model) is not type(experiment.model):
        raise ConfigError(
            f"{run.setting}={run.folder} is a {type(model).__name__}, and this model is a "
            f"{type(experiment.model).__name__}: use a teacher of the same class"
        )
    if any(isinstance(layer.moe.router.select, Forced) for layer in model.sparse_layers()):
        raise ConfigError(
            f"{run.setting}={run.folder} has the router `forced`, and its recorded routing "
            "does not exist for the data of this run: use a teacher with another router"
        )
    if experiment.training.routing_weight:
        check_routing(experiment.model, model, experiment.training.routing_groups)
    try:
        dataclasses.replace(experiment, model=model).check_program(jax.device_count())
    except ConfigError as error:
        raise ConfigError(f"{run.setting}={run.folder}: {error}") from error


def _teacher(run: FinishedRun | Released, session: Session) -> Teacher:
    if isinstance(run, FinishedRun):
        graph, state = run.weights(session.mesh)
        return Teacher(graph, state.params, state.router_state)
    rows, here = run.found.vocab_size, session.tokenizer.vocab_size
    if rows != here:
        raise ConfigError(
            f"{run.setting}={run.folder} has {rows} rows of the embedding, and this run {here}: "
            "start in a new folder, from a model of the same vocabulary"
        )
    return Teacher(*run.parts(session.mesh))


def _first_state(session: Session, run: FinishedRun | Released) -> TrainState:
    if isinstance(run, Released):
        model, source = run.found.config, run.weights(session.mesh)
    else:
        model, (_, state) = run.experiment.model, run.weights(session.mesh)
        source = {n: x for n, x in named_leaves(state).items() if n.startswith(WEIGHTS)}
    only = session.experiment.training.start_with == "shared"
    change = Transplant(only, session.experiment.model, model)
    return session.recipe.create_from(change, source)
