"""Analyses a corpus in the experts of a model: ``moe-jax analyze --model=DIR --corpus=files:GLOB``.

``--corpus=NAME=files:GLOB``, given several times, compares groups such as languages, domains or
users. The page needs no network; the numbers lie beside it as JSON.
"""

from __future__ import annotations

from absl import flags

from moe_jax.analysis.atlas_page import PAGE, lines, write_atlas
from moe_jax.cli import common, inspected
from moe_jax.run.analyzing import analyze


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    inspected.define_model(values, PAGE)
    flags.DEFINE_multi_string(
        "corpus",
        None,
        "Data source, `validation` for the validation set of a run, or group NAME=files:GLOB.",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_multi_integer(
        "earlier", [], "Step of an earlier checkpoint, for saturation.", flag_values=values
    )
    for name, default, meaning in (
        ("documents", 64, "Largest number of documents per group."),
        ("length", 256, "Largest number of tokens per document."),
        ("batch_size", 8, "Number of documents that are read at once."),
    ):
        lowest = 2 if name == "length" else 1
        flags.DEFINE_integer(name, default, meaning, lower_bound=lowest, flag_values=values)
    flags.DEFINE_float(
        "flops_per_joule",
        5e11,
        "FLOPs per joule of the device, for the estimate of energy.",
        lower_bound=1.0,
        flag_values=values,
    )


def main(given: flags.FlagValues) -> None:
    """Prints one line per layer and group, writes page and JSON file, and prints their paths."""
    inspected.check_output(given.output, given.model)
    found = analyze(
        given.model,
        given.corpus,
        step=given.step,
        earlier=given.earlier,
        documents=given.documents,
        length=given.length,
        batch_size=given.batch_size,
        flops_per_joule=given.flops_per_joule,
    )
    files = write_atlas(found, given.output, f"Experts of {given.model} on a corpus")
    inspected.say_all(lines(found), files)


if __name__ == "__main__":
    common.run(define, main)
