"""Measures the gradient noise scale: ``moe-jax noise_scale --config=quickstart --workdir=runs/ns``.

A short run compares the gradients of the microbatches of every step. The command prints a table,
the noise scale in tokens with its interval, and the suggested size of a batch, and writes
``noise_scale.json`` into the workdir. Setting ``training.start_from`` measures at the weights of a
finished run.
"""

from __future__ import annotations

import sys

from absl import flags

from moe_jax import processes, signals
from moe_jax.cli import common
from moe_jax.run.loop import Terminated
from moe_jax.run.noise_scale import measurement, measuring, table, write_measurement
from moe_jax.run.train import Voice, train_in
from moe_jax.training.metrics import read_metrics

_GO_ON = "run the same command to go on"


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    common.define_config(values)
    common.define_workdir(values)
    common.define_hosts(values)
    flags.DEFINE_integer(
        "steps", 100, "Number of steps of the measurement.", lower_bound=10, flag_values=values
    )


def main(given: flags.FlagValues) -> None:
    """Trains for some steps, and prints the noise scale and a suggestion."""
    signals.advise(_GO_ON)
    common.join_hosts(given)
    experiment = measuring(common.experiment_of(given), given.steps)
    folder, voice = common.folder_of(given), Voice(common.say, common.warn)
    try:
        train_in(folder, experiment, common.overrides_of(given), voice)
    except Terminated as stop:
        if processes.is_first():
            common.say(f"{stop}; {_GO_ON}")
        sys.exit(stop.code)
    if processes.is_first():
        measured = measurement(read_metrics(folder), experiment.data.batch_size)
        write_measurement(measured, folder)
        common.say(table(measured))


if __name__ == "__main__":
    common.run(define, main)
