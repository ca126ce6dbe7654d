"""Flags of the alarms of a served stream."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from absl import flags

from moe_jax.cli import common
from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import experiment_of_texts
from moe_jax.errors import ConfigError
from moe_jax.interop.folders import kind_of
from moe_jax.models import Model
from moe_jax.run import workdir
from moe_jax.run.alarms import lines_to_compare
from moe_jax.serving.stream import TrafficRules

_ALARMS = "training.alarms"


def define(values: flags.FlagValues) -> None:
    """Defines ``--config.training.alarms`` and ``--alarm_window``."""
    common.define_overrides(values)
    flags.DEFINE_integer(
        "alarm_window",
        8192,
        "Number of tokens after which the alarms judge the stream.",
        lower_bound=1,
        flag_values=values,
    )


def experiment_of(given: flags.FlagValues) -> Experiment:
    """Returns the experiment of the run, or the default one of another model, with its alarms.

    Raises:
        ConfigError: If a setting is given that serving does not read.
    """
    folder, texts = Path(given.model), common.texts_of(given)
    for name in texts:
        if name != _ALARMS:
            raise ConfigError(
                f"{name} has no effect on serving, which reads {_ALARMS} alone: leave it out"
            )
    run = workdir.load(folder) if kind_of(folder) == "run" else Experiment(folder.name)
    return experiment_of_texts(run, texts)[0] if texts else run


def rules_of(given: flags.FlagValues, experiment: Experiment, model: Model) -> TrafficRules | None:
    """Returns the alarms of the served stream; ``None`` without any.

    Raises:
        ConfigError: If a reference is no run with the layers of the model.
    """
    if not experiment.training.alarms:
        return None
    if kind_of(Path(given.model)) != "run":
        # The default experiment of a converted folder describes another model.
        experiment = dataclasses.replace(experiment, model=model.config)
    compared = lines_to_compare(experiment, Path(given.model), given.step)
    return TrafficRules(experiment.training.alarms, compared, given.alarm_window, common.warn)
