"""Trains in stages: ``moe-jax train_growing quickstart --workdir=runs/growing --growth="parts=2"``.

A stage ends when an alarm of training.alarms with stop=True stops it, and the next stage goes on
with more experts. Each --growth has the flags of `moe-jax grow` without dashes, separated by
spaces, and settings of the next stage: --growth="copy=0,3 noise=0.01
config.optimizer.learning_rate=1e-4". The same command resumes the newest stage.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from moe_jax import signals
from moe_jax.cli import common, words
from moe_jax.config.experiment import Experiment
from moe_jax.run.loop import Terminated
from moe_jax.surgery.growing import train_growing

_GO_ON = "run the same command to go on"
_READERS: Mapping[str, words.Reader] = {
    **dict.fromkeys(("copies", "parts", "hidden", "seed"), words.INTEGER),
    **dict.fromkeys(("copy", "layers"), words.INTEGERS),
    "noise": words.NUMBER,
}


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    common.define_config(values)
    common.define_workdir(values)
    flags.DEFINE_multi_string(
        "growth",
        [],
        "Growth at the end of a stage, such as 'parts=2 noise=0.01'; flags of moe-jax grow.",
        flag_values=values,
    )


def growth_of(text: str, experiment: Experiment) -> dict[str, Any]:
    """Returns the values of one ``--growth`` for ``train_growing``.

    Args:
        text: Words ``NAME=VALUE``, separated by spaces.
        experiment: Configuration whose settings ``config.NAME`` changes.

    Raises:
        ConfigError: If a word is no name of a growth or of a setting, or has a wrong value.
    """
    values, overrides = words.read(f"--growth={text!r}", text, _READERS, experiment)
    return {**values, "overrides": overrides}


def main(given: flags.FlagValues) -> None:
    """Trains all stages."""
    signals.advise(_GO_ON)
    experiment, folder = common.experiment_of(given), common.folder_of(given)
    growths = [growth_of(text, experiment) for text in given.growth]
    try:
        train_growing(experiment, folder, growths, say=common.say)
    except Terminated as stop:
        common.say(f"{stop}; {_GO_ON}")
        sys.exit(stop.code)


if __name__ == "__main__":
    common.run(define, main)
