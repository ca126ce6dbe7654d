"""Trains or resumes a run: ``moe-jax train --config=quickstart --workdir=runs/quickstart``.

Without ``--config``, a run that exists in the workdir goes on with its own settings.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from absl import flags

from moe_jax import processes, signals
from moe_jax.cli import common
from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import experiment_of_texts
from moe_jax.run import workdir
from moe_jax.run.loop import Terminated
from moe_jax.run.train import Voice, train_in

_GO_ON = "run the same command to go on"


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    common.define_config(values)
    common.define_workdir(values)
    common.define_hosts(values)
    flags.DEFINE_string(
        "profile",
        None,
        "Steps FIRST:END to trace into WORKDIR/profile: 5:8 traces the steps 5, 6 and 7.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "change",
        False,
        "Continue a run, finished or not, with another training.steps or other rates.",
        flag_values=values,
    )


def _experiment_of(given: flags.FlagValues, folder: Path) -> tuple[Experiment, dict[str, Any]]:
    """Returns the experiment of ``--config``, or of the run in the folder, and its overrides."""
    if not given["config"].present and (folder / workdir.CONFIG).exists():
        return experiment_of_texts(workdir.load(folder), common.texts_of(given))
    return common.experiment_of(given), common.overrides_of(given)


def main(given: flags.FlagValues) -> None:
    """Trains the run, evaluates it and writes its report."""
    signals.advise(_GO_ON)
    common.join_hosts(given)
    folder = common.folder_of(given)
    experiment, overrides = _experiment_of(given, folder)
    voice, change = Voice(common.say, common.warn), given.change
    try:
        command = common.command_line()
        train_in(
            folder, experiment, overrides, voice, given.profile, change=change, command=command
        )
    except Terminated as stop:
        if processes.is_first():
            common.say(f"{stop}; {_GO_ON}")
        sys.exit(stop.code)


if __name__ == "__main__":
    common.run(define, main)
