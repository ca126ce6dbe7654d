"""Shows runs beside each other: ``moe-jax compare runs/a runs/b --output=compare.html``.

The page has the results of all runs, the settings that differ, and the losses over steps, tokens,
FLOPs and seconds. It needs no network.
"""

from __future__ import annotations

from absl import flags

from moe_jax.analysis.compare import PAGE, compare
from moe_jax.cli import common


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    common.define_folders(values, "Folder of a run; the flag name may be left out.")
    flags.DEFINE_string("output", PAGE, "HTML file to write.", flag_values=values)


def main(given: flags.FlagValues) -> None:
    """Writes the page and prints its path."""
    print(compare(given.folders, given.output))


if __name__ == "__main__":
    common.run(define, main)
