"""Shared parts of the commands that show a model on a page: flags, lines and files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from absl import flags

from moe_jax import files
from moe_jax.cli import common
from moe_jax.errors import ConfigError


def define_model(values: flags.FlagValues, page: str) -> None:
    """Defines ``--model``, ``--step`` and ``--output``, whose default is ``page``."""
    flags.DEFINE_string("model", None, "Folder of the model.", required=True, flag_values=values)
    common.define_step(values)
    flags.DEFINE_string("output", page, "HTML file to write.", flag_values=values)


def check_output(output: str, model: str) -> None:
    """Rejects a page that cannot be written, or that would replace a file of the model.

    Args:
        output: HTML file to write; its JSON file lies beside it.
        model: Folder of the model, in which only the files of an earlier page are replaced.

    Raises:
        ConfigError: If so; the check creates nothing.
    """
    page = Path(output)
    files.check_file(page, "--output")
    numbers = page.with_suffix(".json")
    if page == numbers:
        raise ConfigError(f"--output={output} is the file of the numbers: name the page .html")
    files.check_file(numbers, "--output")
    there = [file for file in (page, numbers) if file.exists()]
    if len(there) == 1 and there[0].resolve().parent == Path(model).resolve():
        raise ConfigError(
            f"--output={output} would replace {there[0]}, a file of the model: use another name"
        )


def say_all(lines: Iterable[str], written: Iterable[Path]) -> None:
    """Prints lines, then the paths of the files that the command has written."""
    for line in (*lines, *map(str, written)):
        common.say(line)
