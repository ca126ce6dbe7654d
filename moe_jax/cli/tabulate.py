"""Makes a routing table: ``moe-jax tabulate --model=DIR --corpus=SOURCE --output=table.npz``.

The table has the experts and gates of the tokens that the training part of the corpus has often.
``--routing_table=table.npz`` makes ``score``, ``serve``, ``generate`` and ``evaluate`` read it in
place of the choices of the routers. The command prints the loss of the validation part without and
with the table as one JSON line.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

from moe_jax import files
from moe_jax.cli import common
from moe_jax.run.tabulating import tabulate


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    for name, meaning in (
        ("model", "Folder of the model."),
        ("corpus", "Data source, such as mixture or files:texts/*.txt."),
        ("output", "File .npz to write."),
    ):
        flags.DEFINE_string(name, None, meaning, required=True, flag_values=values)
    common.define_step(values)
    for name, default, lowest, meaning in (
        ("documents", 512, 1, "Largest number of documents for the table."),
        ("held_out", 64, 1, "Largest number of documents for the measurement."),
        ("length", 256, 2, "Largest number of tokens per document."),
        ("least", 8, 1, "Smallest number of occurrences of a token in the table."),
        ("batch_size", 8, 1, "Number of documents that are read at once."),
    ):
        flags.DEFINE_integer(name, default, meaning, lower_bound=lowest, flag_values=values)


def main(given: flags.FlagValues) -> None:
    """Writes the table and prints its measurement."""
    output = Path(given.output)
    files.check_file(output, "--output")
    found = tabulate(
        given.model,
        given.corpus,
        output,
        step=given.step,
        documents=given.documents,
        held_out=given.held_out,
        length=given.length,
        least=given.least,
        batch_size=given.batch_size,
    )
    common.say(json.dumps(found))


if __name__ == "__main__":
    common.run(define, main)
