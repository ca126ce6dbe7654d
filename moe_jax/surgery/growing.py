"""Training in stages: a rule ends a stage, and the next stage goes on with more experts.

Each stage is a run in a folder of its own, with one compiled step. An alarm of ``training.alarms``
with ``stop=True`` ends a stage.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from moe_jax import files
from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import Config, experiment_of
from moe_jax.errors import ConfigError
from moe_jax.monitor import ALARMS
from moe_jax.monitor.watch import names_of
from moe_jax.processes import check_one_process
from moe_jax.run import workdir
from moe_jax.run.api import OpenRun, Say, train
from moe_jax.run.loop import StoppedByAlarm
from moe_jax.run.memory import check_memory
from moe_jax.run.released import adopted
from moe_jax.surgery.continued import check_going_on, grow_on
from moe_jax.surgery.destination import with_model
from moe_jax.surgery.growth import Growth
from moe_jax.training.metrics import read_metrics
from moe_jax.training.step_folders import latest_step

GrowthOptions = Mapping[str, Any]
"""Values of ``Growth`` by name, and ``overrides``, the new settings of the next stage."""
_OVERRIDES = "overrides"
_GROWTHS = "growths.json"


def train_growing(
    config: Config,
    folder: str | Path,
    growths: Sequence[GrowthOptions],
    overrides: Mapping[str, Any] | None = None,
    *,
    say: Say | None = None,
) -> OpenRun:
    """Trains a model that grows whenever an alarm stops it, and returns the run of the last stage.

    All stages together have ``training.steps`` steps. The state of the optimizer, the position in
    the data and the step follow the model; see ``moe_jax.surgery.continued.follow``. A stopped or
    killed call goes on from its newest checkpoint if it is called again, and the numbers are those
    of a call that ran through.

    Args:
        config: Configuration, with an alarm that stops; see ``moe_jax.monitor.Plateau``.
        folder: Folder of the stages ``stage0``, ``stage1`` and so on.
        growths: Change at the end of each stage but the last; the last stage has no alarms.
        overrides: Settings of the first stage, by dotted name.
        say: Function that receives progress lines; ``None`` for silence.

    Raises:
        ConfigError: If no alarm stops the run, a growth does not fit the model or the devices, or
            the folder holds stages of another configuration. The error is raised before training.
    """
    folder = Path(folder)
    check_one_process("stages of a run that grows train")
    experiment = adopted(experiment_of(config, overrides), _stage(folder, 0))
    check_growths(experiment, growths)
    stage = _begun(folder, experiment, growths)
    with files.naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / _GROWTHS, _recorded(growths))
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


def check_growths(experiment: Experiment, growths: Sequence[GrowthOptions]) -> None:
    """Rejects stages that cannot follow each other on these devices, without computing weights.

    Args:
        experiment: Configuration of the first stage.
        growths: Changes between the stages.

    Raises:
        ConfigError: If no alarm stops the run, the model has adapters, the model of a stage does
            not fit its router, the devices or their memory, or its settings do not fit the stage
            before.
    """
    if not growths or not any(alarm.stop for alarm in experiment.training.alarms):
        raise ConfigError(
            "a run that grows needs a growth and an alarm that stops it: set training.alarms to "
            "({'type': 'Plateau', 'stop': True},)"
        )
    training = experiment.training
    if not training.eval_every and all(a.kind == "eval" for a in training.alarms if a.stop):
        raise ConfigError(
            "the alarms that stop the run read validations, and training.eval_every=0 makes none: "
            "set training.eval_every"
        )
    if experiment.model.lora is not None:
        raise ConfigError(
            "a growth merges adapters into the weights: unset model.lora, or merge the adapters of "
            "a trained run (moe-jax merge_adapters) and grow the merged one"
        )
    for number, options in enumerate(growths, 1):
        growth, overrides = _parted(options)
        try:
            before, model = experiment, growth.model(experiment.model)
            experiment = with_model(before, model, overrides, before.vocab_size)
            check_going_on(before, experiment)
            experiment.check(jax.device_count())
            check_memory(experiment, experiment.vocab_size)
        except ConfigError as error:
            raise ConfigError(f"growth {number} ({growth}): {error}") from error


def _parted(options: GrowthOptions) -> tuple[Growth, dict[str, Any]]:
    """Returns the growth and the settings of the next stage."""
    values = {name: value for name, value in options.items() if name != _OVERRIDES}
    return Growth.of(values), dict(options.get(_OVERRIDES) or {})


def _begun(folder: Path, experiment: Experiment, growths: Sequence[GrowthOptions]) -> int:
    """Returns the number of the newest stage in a folder, or 0.

    Raises:
        ConfigError: If the stages are of another configuration or of other growths.
    """
    found = [path for path in folder.glob("stage*") if (path / workdir.CONFIG).exists()]
    if len(found) > len(growths) + 1:
        raise ConfigError(
            f"{folder} holds {len(found)} stages, and {len(growths)} growths make "
            f"{len(growths) + 1}: give the growths that began the run, or use another folder"
        )
    if found:
        workdir.check_owner(_stage(folder, 0), experiment)
        known = folder / _GROWTHS
        if known.exists() and json.loads(known.read_text()) != _recorded(growths):
            raise ConfigError(
                f"{folder} holds stages of other growths ({known}): give the growths that began "
                "the run, or use another folder"
            )
    return max(len(found) - 1, 0)


def _recorded(growths: Sequence[GrowthOptions]) -> dict[str, Any]:
    """Returns the growths as the folder of the stages records them."""
    values = [(dataclasses.asdict(growth), more) for growth, more in map(_parted, growths)]
    return json.loads(json.dumps({"growths": values}, default=str))


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


def _grow(here: Path, there: Path, options: GrowthOptions, *, last: bool) -> None:
    """Writes the next stage, which goes on at the step of the alarm."""
    growth, overrides = _parted(options)
    settings = {"training.alarms": ()} if last else {}
    grow_on(here, there, growth, settings | overrides)
