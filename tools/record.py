"""The end of commands that measure: a JSON file of figures, and a table in a page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags

from moe_jax import files
from tools.plans import write_table


def define(values: flags.FlagValues, output: str, page: str, rounds: int) -> None:
    """Defines the flags of a command that measures in rounds.

    Args:
        values: Flags of the command.
        output: Default file of the figures.
        page: Default page of the table.
        rounds: Default number of rounds.
    """
    flags.DEFINE_string("output", output, "File of the figures.", flag_values=values)
    flags.DEFINE_string("page", page, "Page that shows the table.", flag_values=values)
    flags.DEFINE_integer("rounds", rounds, "Number of rounds.", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean(
        "quiet", True, "Whether nothing else runs; the page says if not.", flag_values=values
    )


def save(
    given: flags.FlagValues,
    figures: Mapping[str, Any],
    table: Callable[[dict[str, Any]], str],
    marks: tuple[str, str],
) -> None:
    """Writes the figures, with the device and the rounds, and the table of the page.

    Args:
        given: Flags of the command.
        figures: Figures by name.
        table: Function that returns the table of all figures.
        marks: Comments before and after the table.
    """
    device = f"{os.cpu_count()} x {jax.devices()[0].device_kind}"
    whole = {"device": device, **figures, "quiet": given.quiet, "rounds": given.rounds}
    with files.replaced(Path(given.output)) as temporary:
        temporary.write_text(json.dumps(whole, indent=2) + "\n")
    write_table(Path(given.page), table(whole), marks)


def shared(record: Mapping[str, Any]) -> str:
    """Returns the sentence that says that the machine was shared, or ""."""
    return "" if record["quiet"] else " Other programs shared the machine."
