"""Tests a range of learning rates: ``moe-jax lr_range --config=quickstart --workdir=runs/range``.

A short run trains while the learning rate rises exponentially from ``--first`` to ``--last``. The
command prints a table with a suggestion, and writes ``lr_range.jsonl`` and ``lr_range.png`` into
the workdir.
"""

from __future__ import annotations

import sys

from absl import flags

from moe_jax import processes, signals
from moe_jax.cli import common
from moe_jax.errors import ConfigError
from moe_jax.run.loop import Diverged, Terminated
from moe_jax.run.rate_range import rate_curve, rising, table, write_range
from moe_jax.run.train import Voice, train_in
from moe_jax.training.metrics import read_metrics

_GO_ON = "run the same command to go on"


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    common.define_config(values)
    common.define_workdir(values)
    common.define_hosts(values)
    flags.DEFINE_integer(
        "steps", 100, "Number of steps of the test.", lower_bound=2, flag_values=values
    )
    flags.DEFINE_float("first", 1e-6, "Learning rate of the first step.", flag_values=values)
    flags.DEFINE_float("last", 1.0, "Learning rate of the last step.", flag_values=values)


def main(given: flags.FlagValues) -> None:
    """Trains while the learning rate rises, and prints the losses and a suggestion."""
    signals.advise(_GO_ON)
    if "training.steps" in common.texts_of(given):
        raise ConfigError(
            "--steps is the number of steps of the test: leave out --config.training.steps"
        )
    common.join_hosts(given)
    experiment = rising(common.experiment_of(given), given.steps, given.first, given.last)
    folder, voice = common.folder_of(given), Voice(common.say, common.warn)
    try:
        train_in(folder, experiment, common.overrides_of(given), voice)
    except Diverged as end:
        # A test that goes on until the loss is no number has its result.
        common.say(str(end))
    except Terminated as stop:
        if processes.is_first():
            common.say(f"{stop}; {_GO_ON}")
        sys.exit(stop.code)
    if processes.is_first():
        curve = rate_curve(read_metrics(folder))
        write_range(curve, folder)
        common.say(table(curve))


if __name__ == "__main__":
    common.run(define, main)
