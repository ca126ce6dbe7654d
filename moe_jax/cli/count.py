"""Counts a model: ``moe-jax count mixtral_8x7b``.

The command prints one JSON line and allocates no parameters. ``--all`` prints a table of all
published models, with computed and published numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

from moe_jax import files
from moe_jax.cli import common
from moe_jax.config import library
from moe_jax.counting import record
from moe_jax.counting.published import table


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    common.define_config(values)
    flags.DEFINE_bool("all", False, "Print the table of all published models.", flag_values=values)
    flags.DEFINE_string(
        "folder",
        str(library.PUBLISHED),
        "Folder of the configs that --all counts.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "output", None, "Write to this file instead of printing.", flag_values=values
    )


def main(given: flags.FlagValues) -> None:
    """Prints total and active parameters, and FLOPs by part."""
    if given.output:
        files.check_file(Path(given.output), "--output")
    text = table(Path(given.folder)) if given.all else _line(given)
    if given.output:
        with files.replaced(Path(given.output)) as temporary:
            temporary.write_text(text)
    else:
        print(text.rstrip("\n"))


def _line(given: flags.FlagValues) -> str:
    experiment = common.experiment_of(given)
    found = record(experiment.model, experiment.vocab_size, experiment.sequence)
    return json.dumps({"name": experiment.name, **found})


if __name__ == "__main__":
    common.run(define, main)
