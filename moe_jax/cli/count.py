"""Counts a model: ``python -m moe_jax.count --config=configs/published/mixtral_8x7b.py``.

Prints one JSON line; needs no memory for parameters. ``--all`` prints the table of every published
model beside what is printed of it.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

from moe_jax import files
from moe_jax.cli import common
from moe_jax.counting import record
from moe_jax.counting.published import table

_CONFIG = common.define_config()
_ALL = flags.DEFINE_bool("all", False, "Print the table of all published models.")
_FOLDER = flags.DEFINE_string("folder", "configs/published", "Where --all finds them.")
_OUTPUT = flags.DEFINE_string("output", None, "Write to this file instead of printing.")


def main() -> None:
    """Prints total and active parameters, and FLOPs by part."""
    if _OUTPUT.value:
        files.check_file(Path(_OUTPUT.value), "--output")
    text = table(Path(_FOLDER.value)) if _ALL.value else _line()
    if _OUTPUT.value:
        with files.replaced(Path(_OUTPUT.value)) as temporary:
            temporary.write_text(text)
    else:
        print(text.rstrip("\n"))


def _line() -> str:
    experiment = common.experiment_of(_CONFIG)
    found = record(experiment.model, experiment.vocab_size, experiment.sequence)
    return json.dumps({"name": experiment.name, **found})


if __name__ == "__main__":
    common.run(main)
