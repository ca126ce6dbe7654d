"""Evaluates a run and prints one JSON line: ``moe-jax evaluate --workdir=runs/quickstart``."""

from __future__ import annotations

import json

import jax
from absl import flags

from moe_jax import processes
from moe_jax.cli import common
from moe_jax.run.restored import open_restored


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    common.define_workdir(values)
    common.define_step(values)
    common.define_average(values)
    common.define_hosts(values)


def main(given: flags.FlagValues) -> None:
    """Restores a checkpoint and prints loss, bits per byte, accuracy and load."""
    common.join_hosts(given)
    step, session, state = open_restored(common.folder_of(given), given.step, average=given.average)
    with jax.set_mesh(session.mesh):
        record = session.evaluate(state)
    if processes.is_first():
        print(json.dumps({"step": step, **record}))


if __name__ == "__main__":
    common.run(define, main)
