"""Trains in stages: ``moe-jax train_growing quickstart --workdir=runs/growing --growth="parts=2"``.

A stage ends when an alarm of training.alarms with stop=True stops it, and the next stage goes on
with more experts. Each --growth has the flags of `moe-jax grow` without dashes, separated by
spaces, and settings of the next stage: --growth="copy=0,3 noise=0.01
config.optimizer.learning_rate=1e-4". The same command resumes the newest stage.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from absl import flags

from moe_jax import signals
from moe_jax.cli import common
from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import experiment_of_texts
from moe_jax.errors import ConfigError, nearest
from moe_jax.run.loop import Terminated
from moe_jax.surgery.growing import train_growing

_GO_ON = "run the same command to go on"
_SETTING = "config."


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


class _Reader(NamedTuple):
    """A reader of the values of one name, and the values in words."""

    read: Callable[[str], Any]
    kind: str


_INTEGER = _Reader(int, "an integer")
_LIST = _Reader(_numbers, "a list of integers such as 0,3")
_READERS: Mapping[str, _Reader] = {
    **dict.fromkeys(("copies", "parts", "hidden", "seed"), _INTEGER),
    **dict.fromkeys(("copy", "layers"), _LIST),
    "noise": _Reader(float, "a number"),
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
    values: dict[str, Any] = {}
    texts: dict[str, str | None] = {}
    for word in shlex.split(text):
        name, _, value = word.partition("=")
        if name.startswith(_SETTING):
            texts[name.removeprefix(_SETTING)] = value
        elif name not in _READERS:
            raise ConfigError(
                f"--growth={text!r} has no {name!r}{nearest(name, _READERS)}: use "
                f"{', '.join(_READERS)} or {_SETTING}NAME"
            )
        else:
            values[name] = _read(name, value)
    overrides = experiment_of_texts(experiment, texts)[1] if texts else {}
    return {**values, "overrides": overrides}


def _read(name: str, text: str) -> Any:
    reader = _READERS[name]
    try:
        return reader.read(text)
    except ValueError as error:
        raise ConfigError(f"--growth: {name}={text} is not {reader.kind}") from error


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
