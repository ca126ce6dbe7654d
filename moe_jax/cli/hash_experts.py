"""Prints a hash of every expert, one JSON line each: ``moe-jax hash_experts runs/quickstart``.

Equal hashes mean equal float32 values, in a run or in a folder of a released model. A second hash
is of the parameters and the state of the router that belong to the expert.
"""

from __future__ import annotations

import dataclasses
import json

from absl import flags

from moe_jax.cli import common
from moe_jax.surgery.compared import hash_experts


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("model", None, "Folder of the model.", required=True, flag_values=values)
    common.define_step(values)


def main(given: flags.FlagValues) -> None:
    """Prints one JSON line for each expert."""
    for version in hash_experts(given.model, step=given.step):
        common.say(json.dumps(dataclasses.asdict(version)))


if __name__ == "__main__":
    common.run(define, main)
