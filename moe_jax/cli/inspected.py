"""Shared parts of the commands that show a model on a page: flags, lines and files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from absl import flags

from moe_jax.cli import common


def define_model(values: flags.FlagValues, page: str) -> None:
    """Defines ``--model``, ``--step`` and ``--output``, whose default is ``page``."""
    flags.DEFINE_string("model", None, "Folder of the model.", required=True, flag_values=values)
    common.define_step(values)
    flags.DEFINE_string("output", page, "HTML file to write.", flag_values=values)


def say_all(lines: Iterable[str], files: Iterable[Path]) -> None:
    """Prints lines, then the paths of the files that the command has written."""
    for line in (*lines, *map(str, files)):
        common.say(line)
