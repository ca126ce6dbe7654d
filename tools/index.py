"""Writes the index of all ablations from their committed results: ``python -m tools.index``."""

from __future__ import annotations

import sys

from absl import flags

from moe_jax.ablation.catalogue import RESULTS, entries, results
from moe_jax.ablation.index import ROOT, made, outdated
from moe_jax.ablation.report import write_report
from moe_jax.cli import common


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_bool(
        "check", False, "Write nothing; fail if a file is out of date.", flag_values=values
    )
    flags.DEFINE_bool("figures", False, "Also draw the figures again.", flag_values=values)


def main(given: flags.FlagValues) -> None:
    """Writes or checks the index."""
    every = entries()
    if given.figures and not given.check:
        for result in results(every, RESULTS):
            folder = RESULTS / result.folder
            write_report(result.entry.ablation, result.records, result.command, folder)
    files = made(every, RESULTS, ROOT)
    wrong = outdated(files)
    if given.check and wrong:
        names = ", ".join(str(path.relative_to(ROOT)) for path in wrong)
        print(f"out of date with the results: {names}; run python -m tools.index")
        sys.exit(1)
    for path in wrong:
        path.write_text(files[path])
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    common.run(define, main)
