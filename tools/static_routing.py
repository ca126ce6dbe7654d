"""Measures the quality that a table of experts costs a trained model.

``python -m tools.static_routing`` trains ``quickstart`` for 300 steps, makes the routing table of
the training part of its corpus, and evaluates the model on its validation set with its routers and
with the table. It writes ``docs/static_routing.json`` and the table of ``docs/serving.md``. A
trained run in the folder ``--workdir`` is not trained again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from absl import flags

import moe_jax as mj
from moe_jax import files
from moe_jax.cli import common
from moe_jax.run.table_loss import evaluated_with, open_table
from moe_jax.run.tabulating import tabulate
from tools.plans import write_table

MARKS = ("<!-- static routing -->\n", "<!-- end of static routing -->")
VARIANTS = ("quickstart",)
STEPS = 300
SETTINGS = {"training.steps": STEPS, "training.checkpoint_every": STEPS}
_KEPT = ("corpus_tokens", "table_ids", "covered", "agreement")
_HEAD = (
    "| model | token ids in the table | tokens in the table | agreement by layer | loss with the "
    "routers | loss with the table | increase |\n" + "|---" * 7 + "|\n"
)


def measured(variant: str, folder: Path, corpus: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains a variant and returns its losses with the routers and with a table.

    Args:
        variant: Name of a config.
        folder: Folder for the run and for the table.
        corpus: Data source of the table.
        settings: Settings of the run that differ from those of the config.

    Returns:
        Facts of the table, and both evaluations of the validation set of the run.
    """
    run = mj.train(variant, folder / "run", settings, say=print)
    path = folder / "table.npz"
    made = tabulate(run.workdir, corpus, path)
    before = run.evaluate()
    with jax.set_mesh(run.session.mesh):
        table = open_table(str(path), run.workdir)
        after = evaluated_with(table, run.session, run.state, before)
    kept = {name: made[name] for name in _KEPT}
    return {
        "model": variant,
        "steps": run.step,
        **kept,
        "loss": before["loss"],
        "with_table": after,
    }


def table(found: list[dict[str, Any]]) -> str:
    """Returns the table of the measurements."""
    return _HEAD + "".join(map(_row, found))


def _row(one: dict[str, Any]) -> str:
    after = one["with_table"]
    cells = (
        f"`{one['model']}`, {one['steps']} steps",
        f"{one['table_ids']:,}",
        f"{100 * one['covered']:.1f} %",
        ", ".join(f"{100 * share:.0f} %" for share in one["agreement"]),
        f"{one['loss']:.3f}",
        f"{after['loss']:.3f}",
        f"{after['loss_increase']:+.3f}",
    )
    return f"| {' | '.join(cells)} |\n"


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    for name, default, meaning in (
        ("workdir", "runs/static_routing", "Folder of the runs and of their tables."),
        ("output", "docs/static_routing.json", "File of the measurements."),
        ("page", "docs/serving.md", "Page that shows the table."),
    ):
        flags.DEFINE_string(name, default, meaning, flag_values=values)


def main(given: flags.FlagValues) -> None:
    """Measures all variants, and writes the file and the page."""
    found = [
        measured(
            variant, Path(given.workdir) / variant.replace(":", "-"), "python_library", SETTINGS
        )
        for variant in VARIANTS
    ]
    with files.replaced(Path(given.output)) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n")
    write_table(Path(given.page), table(found), MARKS)


if __name__ == "__main__":
    common.run(define, main)
