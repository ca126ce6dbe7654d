"""Opens the alarms of a run: the lines that they have seen, and the runs that they compare with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from moe_jax.config.experiment import Experiment
from moe_jax.errors import ConfigError, line_of
from moe_jax.interop.folders import kind_of
from moe_jax.monitor import Drift, Watch, on_stream
from moe_jax.monitor.alarms import Line
from moe_jax.run import workdir
from moe_jax.run.best import Step, step_of
from moe_jax.training.metrics import read_metrics

# Conditions in words, by alarm and layer.
Conditions: TypeAlias = dict[str, dict[str, str]]


def open_watch(experiment: Experiment, folder: Path, step: int) -> Watch:
    """Returns the alarms of the run in ``folder`` after ``step``.

    Raises:
        ConfigError: If a reference cannot be read; see ``references``.
    """
    alarms = experiment.training.alarms
    if not alarms:
        return Watch(())
    earlier = [line for line in read_metrics(folder) if line["step"] <= step]
    return Watch(alarms, earlier, references(experiment))


def alarms_of(folder: str | Path, step: Step = None) -> Callable[[Line], Conditions]:
    """Returns the function from an evaluation to its conditions by alarm and layer.

    Args:
        folder: Workdir of a run; a folder of another model has no alarms.
        step: Step of the checkpoint; see ``lines_to_compare``.
    """
    folder = Path(folder)
    if kind_of(folder) != "run":
        return lambda line: {}
    experiment = workdir.load(folder)
    if not experiment.training.alarms:
        return lambda line: {}
    compared = lines_to_compare(experiment, folder, step_of(folder, step))
    return lambda line: on_stream(experiment.training.alarms, line, compared)


def lines_to_compare(
    experiment: Experiment, folder: Path, step: Step = None
) -> dict[str, Line | None]:
    """Returns the line of every reference; "" is the last validation of a run, if it has one.

    Args:
        experiment: Alarms, and the model of the folder.
        folder: Workdir of a run, or a folder of another model, which has no validation.
        step: Step of the checkpoint; a number leaves later validations out.

    Raises:
        ConfigError: If a reference cannot be read; see ``references``.
    """
    last = step if isinstance(step, int) else sys.maxsize
    own = [line for line in read_metrics(folder) if line["kind"] == "eval" and line["step"] <= last]
    return {"": own[-1] if own else None, **references(experiment)}


def references(experiment: Experiment) -> dict[str, Line]:
    """Returns the last validation of every run that an alarm compares with, by workdir.

    Raises:
        ConfigError: If a folder holds no validation, or one of other layers or experts.
    """
    drifts = [alarm for alarm in experiment.training.alarms if isinstance(alarm, Drift)]
    return {one.reference: _reference(experiment, one.reference) for one in drifts if one.reference}


def _reference(experiment: Experiment, folder: str) -> Line:
    try:
        lines = [line for line in read_metrics(Path(folder)) if line["kind"] == "eval"]
    except ValueError as error:
        raise ConfigError(line_of(error)) from error
    if not lines:
        raise ConfigError(
            f"training.alarms: reference={folder!r} holds no validation of a run: use the workdir "
            "of a run, or unset it"
        )
    found = {str(layer["layer"]): len(layer["load"]) for layer in lines[-1]["layers"]}
    own = {str(layer.name): layer.moe.num_experts for layer in experiment.model.sparse_layers()}
    if found != own:
        raise ConfigError(
            f"training.alarms: the run in {folder} has experts by layer {found}, and this model "
            f"has {own}: use a run of the same layers"
        )
    return lines[-1]
