"""Flags of the alarms of a served stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from absl import flags

from moe_jax.analysis.observed import Observed
from moe_jax.cli import common
from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import experiment_of_texts
from moe_jax.errors import ConfigError
from moe_jax.interop import folders
from moe_jax.interop.folders import kind_of
from moe_jax.models import Decoder, DecoderConfig, EncoderDecoderConfig
from moe_jax.monitor import Alarm, Drift
from moe_jax.run import workdir
from moe_jax.run.alarms import lines_to_compare, references
from moe_jax.run.opened import FolderModel
from moe_jax.run.reference_stream import reference_stream
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
    experiment = experiment_of_texts(run, texts)[0] if texts else run
    _check_references(experiment, folder)
    return experiment


def _check_references(experiment: Experiment, folder: Path) -> None:
    """Rejects references without the layers of the folder's model, of which no weights are read.

    Raises:
        ConfigError: If so.
    """
    if not experiment.training.alarms or kind_of(folder) == "none":
        return
    if kind_of(folder) != "run":
        described = folders.describe(folder).config
        assert isinstance(described, DecoderConfig | EncoderDecoderConfig)  # as every folder's
        experiment = dataclasses.replace(experiment, model=described)
    references(experiment)


def rules_of(
    given: flags.FlagValues, experiment: Experiment, opened: FolderModel
) -> TrafficRules | None:
    """Returns the alarms of the served stream; ``None`` without any.

    Rules of drift read the validation documents of their references first, except with a budget
    for experts, under which a model may be larger than the device.

    Raises:
        ConfigError: If a reference is no run with the layers of the model.
    """
    folder = Path(given.model)
    alarms = tuple(alarm for alarm in experiment.training.alarms if _on_tokens(alarm))
    for alarm in experiment.training.alarms:
        if alarm not in alarms:
            common.warn(
                f"{type(alarm).__name__} raises no alarm here: a served stream has choices of "
                "experts, and neither scores nor losses"
            )
    if not alarms:
        return None
    if kind_of(folder) != "run":
        # The default experiment of a converted folder describes another model.
        experiment = dataclasses.replace(experiment, model=opened.model.config)
    compared = lines_to_compare(experiment, folder, given.step)
    names = {alarm.reference for alarm in alarms if isinstance(alarm, Drift)}
    streams = {} if given.expert_bytes else _streams(names, folder, opened)
    return TrafficRules(alarms, compared, given.alarm_window, common.warn, streams)


def _on_tokens(alarm: Alarm) -> bool:
    """Returns whether a rule reads the choices of tokens alone."""
    return alarm.reads_streams and not alarm.reads_top_scores


def _streams(names: Iterable[str], folder: Path, opened: FolderModel) -> dict[str, Observed]:
    """Returns the documents of the references of a decoder that can be compared with its tokens."""
    if not isinstance(opened.model, Decoder):
        return {}
    found = {name: reference_stream(name, folder, opened) for name in sorted(names)}
    return {name: stream[0] for name, stream in found.items() if stream is not None}
