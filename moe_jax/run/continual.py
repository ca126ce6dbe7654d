"""Continual learning: runs on a second source from the weights of a run on a first source.

The source of all runs is a blend of both, so that each validation has the loss of each part. A part
without rows in training has the least weight that a blend can have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import Config, experiment_of
from moe_jax.data import BLEND, PartConfig
from moe_jax.errors import ConfigError
from moe_jax.run import workdir
from moe_jax.run.api import OpenRun, train

# The share of a part that a run validates and does not train on: less than one row in any run.
_UNTRAINED = 1e-6
FIRST = "first"
Begin = Callable[[Path, Path, Mapping[str, Any]], object]
"""Function that writes a run at step 0 from the first run: its folder, the new one, settings."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train on the second source.

    Attributes:
        replay: Share of the training rows that come from the first source, from 0 to below 1.
        settings: Further settings of this run, by dotted name.
        begin: Function that writes the run from the first run, with another model; ``None`` starts
            from the weights of the first run. See ``moe_jax.surgery.new_experts``.
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


def continual(
    config: Config,
    folder: str | Path,
    methods: Mapping[str, Method],
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Transfer]:
    """Trains on the first part of a blend, then by each method on the second, and compares.

    Args:
        config: Configuration, whose ``data.blend.parts`` are the two sources; their weights are
            replaced.
        folder: Folder of the runs: ``first``, and one for each method. Finished runs are kept.
        methods: Methods by name.
        overrides: Settings of all runs, by dotted name.

    Raises:
        ConfigError: If the source is not a blend of two parts, or if a method is called ``first``
            or has a share of replay outside of its range.
    """
    experiment = experiment_of(config, overrides)
    parts = experiment.data.blend.parts
    if experiment.data.source != BLEND or len(parts) != 2:
        raise ConfigError(
            "continual learning compares two sources: set data.source=blend and two "
            "data.blend.parts"
        )
    for name, method in methods.items():
        if name == FIRST or not 0 <= method.replay < 1:
            raise ConfigError(
                f"method {name!r} with replay={method.replay}: give it another name than "
                f"{FIRST!r}, and a replay from 0 to below 1"
            )
    start = Path(folder) / FIRST
    before = train(experiment, start, _shares(parts, 1.0)).result
    transfers = {}
    for name, method in methods.items():
        settings = _shares(parts, method.replay) | dict(method.settings)
        run = _trained(experiment, start, Path(folder) / name, settings, method.begin)
        transfers[name] = Transfer.between(before, run.result)
    return transfers


def _trained(
    experiment: Experiment,
    start: Path,
    folder: Path,
    settings: Mapping[str, Any],
    begin: Begin | None,
) -> OpenRun:
    """Returns the run of a method, trained to its end."""
    if begin is None:
        return train(experiment, folder, {"training.start_from": str(start), **settings})
    if not (folder / workdir.CONFIG).exists():
        begin(start, folder, settings)
    return train(workdir.load(folder), folder)


def _shares(parts: tuple[PartConfig, ...], first: float) -> dict[str, Any]:
    """Returns the setting of the parts with a share ``first`` of rows from the first part."""
    shares = [max(share, _UNTRAINED) for share in (first, 1 - first)]
    return {
        "data.blend.parts": tuple(
            dataclasses.asdict(dataclasses.replace(part, weight=share))
            for part, share in zip(parts, shares, strict=True)
        )
    }
