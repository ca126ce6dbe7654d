"""Opens the alarms of a run: the lines that they have seen, and the runs that they compare with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.config.experiment import Experiment
from moe_jax.errors import ConfigError, line_of
from moe_jax.monitor import ALARMS, Drift, Watch, on_stream
from moe_jax.monitor.alarms import Line
from moe_jax.training.metrics import read_metrics


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


def judged(
    experiment: Experiment, folder: Path, step: int, means: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns an evaluation with the conditions of the run's alarms on the evaluated stream.

    A rule of drift without a reference compares with the run's last validation up to ``step``. A
    run without alarms gets its evaluation as it is.

    Args:
        experiment: Configuration of the evaluation.
        folder: Workdir of the run.
        step: Step of the checkpoint.
        means: Result of the evaluation.

    Raises:
        ConfigError: If a reference cannot be read; see ``references``.
    """
    alarms = experiment.training.alarms
    if not alarms:
        return dict(means)
    own = [line for line in read_metrics(folder) if line["kind"] == "eval" and line["step"] <= step]
    found = on_stream(alarms, means, {"": own[-1] if own else None, **references(experiment)})
    return {**means, ALARMS: found, "active_alarms": sum(map(len, found.values()))}


def in_words(means: Mapping[str, Any]) -> list[str]:
    """Returns one line for each condition of an evaluation."""
    return [
        f"{name} in layer {layer}: {words}"
        for name, layers in means.get(ALARMS, {}).items()
        for layer, words in layers.items()
    ]


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
