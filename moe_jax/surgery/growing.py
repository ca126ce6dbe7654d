"""Training in stages: a rule ends a stage, and the next stage goes on with more experts.

Each stage is a run in a folder of its own, with one compiled step. An alarm of ``training.alarms``
with ``stop=True`` ends a stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import Config, experiment_of
from moe_jax.errors import ConfigError
from moe_jax.monitor import ALARMS
from moe_jax.monitor.watch import names_of
from moe_jax.run import workdir
from moe_jax.run.api import OpenRun, Say, train
from moe_jax.run.loop import StoppedByAlarm
from moe_jax.surgery.api import grow
from moe_jax.training.metrics import read_metrics
from moe_jax.training.step_folders import latest_step

Growth = Mapping[str, Any]
"""Arguments of ``moe_jax.surgery.api.grow``, such as ``{"parts": 2, "noise": 0.01}``."""


def train_growing(
    config: Config,
    folder: str | Path,
    growths: Sequence[Growth],
    overrides: Mapping[str, Any] | None = None,
    *,
    say: Say | None = None,
) -> OpenRun:
    """Trains a model that grows whenever an alarm stops it, and returns the run of the last stage.

    All stages together have ``training.steps`` steps. A stopped or killed call goes on from its
    newest checkpoint if it is called again, and the numbers are those of a call that ran through.

    Args:
        config: Configuration, with an alarm that stops; see ``moe_jax.monitor.Plateau``.
        folder: Folder of the stages ``stage0``, ``stage1`` and so on.
        growths: Change at the end of each stage but the last; the last stage has no alarms.
        overrides: Settings of the first stage, by dotted name.
        say: Function that receives progress lines; ``None`` for silence.

    Raises:
        ConfigError: If no alarm stops the run, or a growth does not fit the model.
    """
    folder = Path(folder)
    experiment = experiment_of(config, overrides)
    if not growths or not any(alarm.stop for alarm in experiment.training.alarms):
        raise ConfigError(
            "a run that grows needs a growth and an alarm that stops it: set training.alarms to "
            "({'type': 'Plateau', 'stop': True},)"
        )
    stage = len([path for path in folder.glob("stage*") if (path / workdir.CONFIG).exists()])
    stage = max(stage - 1, 0)
    while True:
        here = _stage(folder, stage)
        if stage:
            experiment = workdir.load(here)
        if stage == len(growths) or not _was_stopped(here, experiment):
            try:
                return train(experiment, here, say=say)
            except StoppedByAlarm as stop:
                (say or _silent)(str(stop))
            if not _was_stopped(here, experiment):  # at its last step, so it only has to finish
                continue
        _grow(here, _stage(folder, stage + 1), growths[stage], last=stage + 1 == len(growths))
        stage += 1


def _stage(folder: Path, stage: int) -> Path:
    return folder / f"stage{stage}"


def _silent(text: str) -> None:
    del text


def _was_stopped(folder: Path, experiment: Experiment) -> bool:
    """Returns whether an alarm stopped the run at its newest checkpoint, before its last step."""
    step = latest_step(folder / workdir.CHECKPOINTS)
    if not step or step >= experiment.training.steps:
        return False
    alarms = experiment.training.alarms
    stops = {name for name, one in zip(names_of(alarms), alarms, strict=True) if one.stop}
    lines = [line for line in read_metrics(folder) if line["step"] == step]
    return any(stops & set(line.get(ALARMS, {})) for line in lines)


def _grow(here: Path, there: Path, growth: Growth, *, last: bool) -> None:
    """Writes the next stage, with the steps that are left."""
    experiment, step = workdir.load(here), latest_step(here / workdir.CHECKPOINTS)
    assert step is not None  # The run was stopped after a step, which is saved.
    settings: dict[str, Any] = {"training.steps": experiment.training.steps - step}
    if last:
        settings["training.alarms"] = ()
    given = dict(growth)
    given["overrides"] = settings | dict(given.get("overrides") or {})
    grow(here, there, **given)
