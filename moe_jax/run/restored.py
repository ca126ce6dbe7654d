"""Opens a run at one of its checkpoints for reading."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from moe_jax import data, processes
from moe_jax.config.experiment import Experiment
from moe_jax.errors import ConfigError
from moe_jax.parallel import MeshConfig
from moe_jax.run import workdir
from moe_jax.run.best import Step, step_of
from moe_jax.run.loop import Loop
from moe_jax.run.session import Session, open_checkpoints, open_session
from moe_jax.training.average import with_average
from moe_jax.training.checkpoint import latest_step
from moe_jax.training.state import TrainState


def open_restored(
    folder: str | Path, step: Step = None, *, average: bool = True
) -> tuple[int, Session, TrainState]:
    """Returns step, session and state of a checkpoint in a workdir, by default the newest intact.

    The parameters of the state are the averaged ones, if the run keeps an average and ``average``
    is True.

    The session uses the run's mesh if that mesh fits the devices, else the default mesh, in which
    each device holds a copy of the model.

    Raises:
        ConfigError: If the folder holds no run, or no checkpoint yet, if the text of the corpus has
            changed since the run began, or if the checkpoint of the best step is not kept.
        CheckpointError: If no checkpoint is intact, or the one of ``step`` is not.
    """
    folder = Path(folder)
    experiment = workdir.load(folder)
    try:
        experiment.mesh.resolve(jax.device_count())
    except ConfigError:
        experiment = dataclasses.replace(experiment, mesh=MeshConfig())
    experiment.check_program(jax.device_count())
    data.check_source(experiment.data)  # The folder has the tokenizer.
    directory = folder / workdir.CHECKPOINTS
    if latest_step(directory) is None:
        raise ConfigError(f"{folder} holds no checkpoint yet: train first")
    processes.first(lambda: _check_corpus(experiment, folder))
    session = open_session(experiment, data.load_tokenizer(folder))
    with open_checkpoints(experiment, directory, read_only=True) as checkpoints:
        found, state, _ = Loop(session, checkpoints, folder).restore(step_of(folder, step))
    return found, session, with_average(state) if average else state


def _check_corpus(experiment: Experiment, folder: Path) -> None:
    workdir.check_corpus(folder, dataclasses.asdict(data.read_contents(experiment.data)))
