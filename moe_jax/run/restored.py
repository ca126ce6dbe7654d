"""Opens a run at one of its checkpoints for reading."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from moe_jax import data, processes
from moe_jax.config.experiment import Experiment
from moe_jax.errors import ConfigError
from moe_jax.parallel import MeshConfig
from moe_jax.run import workdir
from moe_jax.run.best import Step, step_of
from moe_jax.run.evaluation import check_same_weights
from moe_jax.run.loop import Loop
from moe_jax.run.session import Session, open_checkpoints, open_session
from moe_jax.training.average import with_average
from moe_jax.training.state import TrainState
from moe_jax.training.step_folders import latest_step


def open_restored(
    folder: str | Path,
    step: Step = None,
    change: Callable[[Experiment], Experiment] | None = None,
    *,
    average: bool = True,
) -> tuple[int, Session, TrainState]:
    """Returns step, session and state of a checkpoint in a workdir.

    The session uses the run's mesh if that mesh fits the devices, else the default mesh, in which
    each device holds a copy of the model.

    Args:
        folder: Workdir of the run.
        step: Step of the checkpoint, or ``best`` for the lowest validation loss; ``None`` for the
            newest intact one.
        change: Function from the run's experiment to the experiment of the session, which has the
            same parameters; ``None`` for no change.
        average: False returns the trained parameters of a run that keeps an average of them.

    Raises:
        ConfigError: If the folder holds no run, or no checkpoint yet, if the text of the corpus has
            changed since the run began, or if the checkpoint of the best step is not kept.
        CheckpointError: If no checkpoint is intact, or the one of ``step`` is not.
    """
    folder = Path(folder)
    saved = on_fitting_mesh(workdir.load(folder))
    experiment = change(saved) if change else saved
    experiment.check_program(jax.device_count())
    data.check_source(experiment.data)  # The folder has the tokenizer.
    directory = folder / workdir.CHECKPOINTS
    if latest_step(directory) is None:
        raise ConfigError(f"{folder} holds no checkpoint yet: train first")
    tokenizer = data.load_tokenizer(folder)
    check_same_weights(saved, experiment, tokenizer.vocab_size)
    if experiment.data.source == saved.data.source:
        processes.first(lambda: _check_corpus(saved, folder))
    session = open_session(experiment, tokenizer)
    with open_checkpoints(experiment, directory, read_only=True) as checkpoints:
        found, state, _ = Loop(session, checkpoints, folder).restore(step_of(folder, step))
    return found, session, with_average(state) if average else state


def on_fitting_mesh(experiment: Experiment) -> Experiment:
    """Returns the experiment with its mesh, or with the default one; see ``fitting``."""
    return dataclasses.replace(experiment, mesh=fitting(experiment.mesh))


def fitting(mesh: MeshConfig) -> MeshConfig:
    """Returns a mesh if it fits the devices, else the default mesh of copies of the model."""
    try:
        mesh.resolve(jax.device_count())
    except ConfigError:
        return MeshConfig()
    return mesh


def _check_corpus(experiment: Experiment, folder: Path) -> None:
    workdir.check_corpus(folder, dataclasses.asdict(data.read_contents(experiment.data)))
