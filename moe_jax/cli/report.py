"""Writes the report of a run again: ``moe-jax report --workdir=runs/quickstart``."""

from __future__ import annotations

from absl import flags

from moe_jax.analysis.report import write_report
from moe_jax.cli import common


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    common.define_workdir(values)


def main(given: flags.FlagValues) -> None:
    """Writes ``report.html`` and prints its path."""
    print(write_report(common.folder_of(given)))


if __name__ == "__main__":
    common.run(define, main)
