"""Measures forgetting: ``moe-jax continual CONFIG --workdir=DIR --first=A --second=B --method=M``.

The first run trains on the source --first. Each --method then starts from its weights and trains on
the source --second. A method is a name, or a name with a colon and words: replay=0.25 is the share
of rows from the first source, copy=0,3 adds copies of these experts and freezes the old experts,
and config.NAME=VALUE is a setting of this run. An example is --method="kept: replay=0.25
config.optimizer.frozen=router". The same command goes on after an interruption.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence

from absl import flags

from moe_jax import files, signals
from moe_jax.cli import common, words
from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import experiment_of
from moe_jax.data import BLEND
from moe_jax.errors import ConfigError
from moe_jax.run.continual import Method, continual
from moe_jax.run.loop import Terminated
from moe_jax.surgery.new_experts import with_new_experts

TRANSFERS = "transfers.json"
_GO_ON = "run the same command to go on"
_READERS: Mapping[str, words.Reader] = {"copy": words.INTEGERS, "replay": words.NUMBER}
_NAME = re.compile(r"[\w-]+")
_EXAMPLE = "--first=python_library --second=mixture"


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    common.define_config(values)
    common.define_workdir(values)
    flags.DEFINE_string(
        "first",
        "",
        "Source of the first run, as data.source; by default the first of data.blend.parts.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "second",
        "",
        "Source of the methods, as data.source; by default the second of data.blend.parts.",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "method",
        [],
        "Way to train on the second source, such as 'tuned' or 'replay: replay=0.25'.",
        flag_values=values,
    )


def with_sources(experiment: Experiment, given: flags.FlagValues) -> Experiment:
    """Returns the experiment with the blend of ``--first`` and ``--second``.

    Args:
        experiment: Configuration of the command.
        given: Flags of the command.

    Raises:
        ConfigError: If one of both is missing, or the settings name the sources too.
    """
    sources = given.first, given.second
    if not any(sources):
        if experiment.data.source == BLEND:
            return experiment
        raise ConfigError(f"--first and --second, the two sources, are missing: try {_EXAMPLE}")
    if not all(sources):
        raise ConfigError(f"--first and --second are the two sources: give both, as {_EXAMPLE}")
    for name in common.texts_of(given):
        if name in ("data.source", "data.blend.parts"):
            raise ConfigError(
                f"--first and --second take the place of --config.{name}: leave it out"
            )
    if given.first == given.second:
        raise ConfigError(f"--first and --second are both {given.first!r}: give two sources")
    parts = tuple({"source": source} for source in sources)
    return experiment_of(experiment, {"data.source": BLEND, "data.blend.parts": parts})


def methods_of(texts: Sequence[str], experiment: Experiment) -> dict[str, Method]:
    """Returns the methods of all ``--method`` flags by name.

    Args:
        texts: Values of the flags.
        experiment: Configuration whose settings ``config.NAME`` changes.

    Raises:
        ConfigError: If there is no method, a name is missing or repeated, or a word is wrong.
    """
    methods: dict[str, Method] = {}
    for text in texts:
        name, _, rest = text.partition(":")
        name, flag = name.strip(), f"--method={text!r}"
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{flag} begins with no name of letters, digits, - and _: give one, and a colon "
                "before other words, such as 'replay: replay=0.25'"
            )
        if name in methods:
            raise ConfigError(f"{flag}: another method is called {name!r} too; rename one")
        values, settings = words.read(flag, rest, _READERS, experiment)
        if "copy" in values:
            methods[name] = with_new_experts(**values, settings=settings)
        else:
            methods[name] = Method(**values, settings=settings)
    if not methods:
        raise ConfigError("--method is missing: try --method=tuned --method='kept: replay=0.25'")
    return methods


def main(given: flags.FlagValues) -> None:
    """Trains all runs that are not finished, and writes and prints what they forget and gain."""
    signals.advise(_GO_ON)
    experiment, folder = common.experiment_of(given), common.folder_of(given)
    experiment = with_sources(experiment, given)
    methods = methods_of(given.method, experiment)
    try:
        transfers = continual(experiment, folder, methods, say=common.say)
    except Terminated as stop:
        common.say(f"{stop}; {_GO_ON}")
        sys.exit(stop.code)
    found = {name: dataclasses.asdict(transfer) for name, transfer in transfers.items()}
    files.write_json(folder / TRANSFERS, found)
    common.say("\n".join(f"{name}: {transfer}" for name, transfer in transfers.items()))


if __name__ == "__main__":
    common.run(define, main)
