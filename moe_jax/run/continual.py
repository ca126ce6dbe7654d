"""Continual learning: runs on a second source from the weights of a run on a first source.

The source of all runs is a blend of both, so that each validation has the loss of each part. A part
that is not trained on has a weight so small that a stream takes at most one row of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import Config, experiment_of
from moe_jax.data import BLEND, PartConfig
from moe_jax.errors import ConfigError
from moe_jax.processes import check_one_process
from moe_jax.run import workdir
from moe_jax.run.api import Say, train
from moe_jax.run.predecessors import check_weights
from moe_jax.run.released import adopted
from moe_jax.run.train import check_new

# The share of a part that a run validates and does not train on; a stream may begin with one row.
_UNTRAINED = 1e-6
FIRST = "first"
_OWN = ("data.source", "data.blend.parts", "training.start_from")
_OF_TOKENIZER = ("data.tokenizer", "data.vocab_size")


class Begin(Protocol):
    """Start of a run from the first run, with another model."""

    def experiment(self, first: Experiment, settings: Mapping[str, Any]) -> Experiment:
        """Returns the configuration of the run; no weights are needed.

        Args:
            first: Configuration of the first run.
            settings: Settings of the run, by dotted name.

        Raises:
            ConfigError: If the model cannot change in this way, or a setting does not fit.
        """

    def write(self, first: Path, folder: Path, settings: Mapping[str, Any]) -> None:
        """Writes the run at step 0.

        Args:
            first: Folder of the first run, which is finished.
            folder: Folder of the run, empty or missing.
            settings: Settings of the run, by dotted name.
        """


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train on the second source.

    Attributes:
        replay: Share of the training rows that come from the first source, from 0 to below 1.
        settings: Further settings of this run, by dotted name.
        begin: Start of the run with another model; ``None`` starts from the weights of the first
            run. See ``moe_jax.surgery.new_experts``.
    """

    replay: float = 0.0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    begin: Begin | None = None


@dataclasses.dataclass(frozen=True)
class Transfer:
    """The changes of both validation losses from the end of the first run to the end of the second.

    Attributes:
        forgetting: Rise of the loss of the first source, in nats per target.
        gain: Fall of the loss of the second source, in nats per target.
    """

    forgetting: float
    gain: float

    @classmethod
    def between(cls, before: Mapping[str, Any], after: Mapping[str, Any]) -> Transfer:
        """Returns the changes between two results, whose ``parts`` are both sources in order."""
        old, new = ([part["loss"] for part in run["parts"].values()] for run in (before, after))
        return cls(forgetting=new[0] - old[0], gain=old[1] - new[1])

    def __str__(self) -> str:
        return f"forgets {self.forgetting:.3f}, gains {self.gain:.3f} nats per target"


def continual(
    config: Config,
    folder: str | Path,
    methods: Mapping[str, Method],
    overrides: Mapping[str, Any] | None = None,
    *,
    say: Say | None = None,
) -> dict[str, Transfer]:
    """Trains on the first part of a blend, then by each method on the second, and compares.

    Args:
        config: Configuration, whose ``data.blend.parts`` are the two sources; their weights are
            replaced.
        folder: Folder of the runs: ``first``, and one for each method. Finished runs are kept.
        methods: Methods by name.
        overrides: Settings of all runs, by dotted name.
        say: Function that receives progress lines; ``None`` for silence.

    Raises:
        ConfigError: If the source is not a blend of two parts, or a method is called ``first``, has
            a share of replay outside of its range, settings that do not fit the first run, or a
            folder with another run. The error is raised before training.
    """
    check_one_process("continual learning runs")
    experiment = experiment_of(config, overrides)
    parts = _sources(experiment)
    start = Path(folder) / FIRST
    first = adopted(experiment_of(experiment, _shares(parts, 1.0)), start)
    _check(first, start)
    settings = {
        name: _shares(parts, method.replay) | dict(method.settings)
        for name, method in methods.items()
    }
    runs = {
        name: _experiment(name, method, settings[name], first, start)
        for name, method in methods.items()
    }
    before = _trained(first, start, say)
    transfers = {}
    for name, method in methods.items():
        there = Path(folder) / name
        if method.begin is not None and not (there / workdir.CONFIG).exists():
            method.begin.write(start, there, settings[name])
        transfers[name] = Transfer.between(before, _trained(runs[name], there, say))
    return transfers


def _sources(experiment: Experiment) -> tuple[PartConfig, ...]:
    """Returns the two sources."""
    parts = experiment.data.blend.parts
    if experiment.data.source != BLEND or len(parts) != 2:
        raise ConfigError(
            "continual learning compares two sources: set data.source=blend and two "
            "data.blend.parts"
        )
    return parts


def _check(experiment: Experiment, folder: Path) -> None:
    """Rejects a run that cannot work on these devices, or whose folder has another run."""
    check_new(experiment)
    workdir.check_folder(folder)
    workdir.check_owner(folder, experiment)


def _experiment(
    name: str, method: Method, settings: Mapping[str, Any], first: Experiment, start: Path
) -> Experiment:
    """Returns the configuration of a method's run, which is checked without the first run."""
    try:
        _check_method(name, method)
        if method.begin is None:
            experiment = _from_weights(settings, first, start)
        else:
            experiment = method.begin.experiment(first, settings)
        _check(experiment, start.with_name(name))
    except ConfigError as error:
        raise ConfigError(f"method {name!r}: {error}") from error
    return experiment


def _check_method(name: str, method: Method) -> None:
    if name == FIRST:
        raise ConfigError(
            "the folder of this name has the first run: use another name than 'first'"
        )
    if not 0 <= method.replay < 1:
        raise ConfigError(f"replay={method.replay} is out of range: set a replay from 0 to below 1")
    for setting in method.settings:
        if setting in _OWN:
            raise ConfigError(f"{setting} is set by continual learning: leave it out")
        if setting in _OF_TOKENIZER:
            raise ConfigError(f"{setting} belongs to the weights of the first run: leave it out")


def _from_weights(settings: Mapping[str, Any], first: Experiment, start: Path) -> Experiment:
    """Returns the configuration of a run from the weights of the first run."""
    experiment = experiment_of(first, {"training.start_from": str(start), **settings})
    name = f"training.start_from={start}"
    check_weights(experiment, first.model, name, first.vocab_size)
    if experiment.data.sentinels != first.data.sentinels:
        raise ConfigError("data.spans and data.mask_rate belong to the weights of the first run")
    return experiment


def _trained(experiment: Experiment, folder: Path, say: Say | None) -> Mapping[str, Any]:
    """Returns the result of a run, trained to its end."""
    if say is not None:
        say(f"run         {folder}")
    return train(experiment, folder, say=say).result


def _shares(parts: tuple[PartConfig, ...], first: float) -> dict[str, Any]:
    """Returns the setting of the parts with a share ``first`` of rows from the first part."""
    shares = [max(share, _UNTRAINED) for share in (first, 1 - first)]
    return {
        "data.blend.parts": tuple(
            dataclasses.asdict(dataclasses.replace(part, weight=share))
            for part, share in zip(parts, shares, strict=True)
        )
    }
