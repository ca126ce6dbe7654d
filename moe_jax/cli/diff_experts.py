"""Compares the experts of two models: ``moe-jax diff_experts runs/a --other=runs/b``.

A JSON line for each expert has the norm of the change of its network, divided by its norm in the
first model, and the same for what belongs to the expert in the router. With ``--step`` and
``--other_step``, both models may be of one run.
"""

from __future__ import annotations

import dataclasses
import json

from absl import flags

from moe_jax.cli import changed_models, common
from moe_jax.surgery.compared import diff_experts


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("model", None, "Folder of the model.", required=True, flag_values=values)
    common.define_step(values)
    changed_models.define_other(values)


def main(given: flags.FlagValues) -> None:
    """Prints one JSON line for each expert, and the number of equal experts."""
    changes = diff_experts(given.model, given.other, step=given.step, other_step=given.other_step)
    for change in changes:
        common.say(json.dumps({**dataclasses.asdict(change), "equal": change.equal}))
    equal = sum(change.equal for change in changes)
    common.say(f"{equal} of {len(changes)} experts are equal")


if __name__ == "__main__":
    common.run(define, main)
