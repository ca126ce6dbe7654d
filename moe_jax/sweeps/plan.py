"""The planned runs of a sweep: their settings, folders and training commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import experiment_of_texts, values_of_texts
from moe_jax.errors import ConfigError
from moe_jax.run import workdir as folders
from moe_jax.run.released import adopted
from moe_jax.run.side_by_side import RunFiles, Task
from moe_jax.sweeps.axes import Axis, Point, name_of, settings_of

RUNS, _COMPILED = "runs", "compiled"
# Numbers of ``result.json`` that a sweep can compare, and whether a larger one is better.
METRICS = {"loss": False, "bits_per_byte": False, "accuracy": True}
# Settings as on a command line; ``None`` switches a bool on.
Texts: TypeAlias = Mapping[str, str | None]


@dataclasses.dataclass(frozen=True)
class SweepRun(RunFiles):
    """One run of a sweep.

    Attributes:
        point: Value of each axis, as text.
        folder: Workdir of the run.
    """

    point: Point
    folder: Path

    @property
    def record(self) -> dict[str, Any]:
        """Settings of the run, its folder, and the numbers of its validation if it has ended."""
        state = "finished" if self.finished else "diverged" if self.diverged else "unfinished"
        numbers = {name: self.result[name] for name in METRICS} if self.finished else {}
        return {"run": self.folder.name, **self.point, "state": state, **numbers}


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """The settings that all runs of a sweep share.

    Attributes:
        config: File of the config, with its argument after a colon.
        texts: Changed settings as on a command line.
        folder: Folder of the sweep.
    """

    config: str
    texts: Texts
    folder: Path

    def typed(self, axis: Axis) -> Axis:
        """Returns the axis with its values as they are written in a config.

        Raises:
            ConfigError: If the setting does not exist or a text is no value of it.
        """
        values = [self._read(axis, text) for text in axis.texts]
        if not axis.is_range:
            return dataclasses.replace(axis, texts=tuple(map(str, values)))
        if not all(isinstance(value, int | float) for value in values):
            raise ConfigError(f"--over {axis.name} is no number: list values separated by commas")
        return dataclasses.replace(axis, whole=isinstance(values[0], int))

    def checked(self, point: Point) -> SweepRun:
        """Returns the run of a point.

        Raises:
            ConfigError: If the settings contradict each other, or the folder of the run holds a run
                of another configuration.
        """
        experiment = self._experiment(settings_of(point))[0]
        trial = SweepRun(point, self.folder / RUNS / name_of(point))
        if trial.folder.exists():
            overrides = self._experiment(settings_of(point))[1]
            owner = adopted(experiment, trial.folder, overrides)
            folders.check_owner(trial.folder, owner, change=None)
        return trial

    def task(self, trial: SweepRun, scale: str) -> Task:
        """Returns the training of a run."""
        texts = {**self.texts, **settings_of(trial.point)}
        settings = (f"--config.{n}" + ("" if t is None else f"={t}") for n, t in texts.items())
        return Task(
            name=trial.folder.name,
            arguments=(f"--config={self.config}", *settings),
            folder=trial.folder,
            compiled=self.folder / _COMPILED,
            scale=scale,
        )

    def _read(self, axis: Axis, text: str) -> Any:
        texts = dict.fromkeys(axis.settings, text)
        if axis.is_range:
            return self._experiment(texts)[1][axis.settings[0]]
        # A listed value may fit only beside values of other settings; ``checked`` sees all of them.
        return values_of_texts(self.config, {**self.texts, **texts})[axis.settings[0]]

    def _experiment(self, texts: Mapping[str, str]) -> tuple[Experiment, dict[str, Any]]:
        return experiment_of_texts(self.config, {**self.texts, **texts})
