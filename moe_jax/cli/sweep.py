"""Trains runs over values of settings: ``moe-jax sweep quickstart --over seed=0..3 --workdir=DIR``.

``--over`` takes values, ``optimizer.learning_rate=1e-3,3e-3``, or a range from which a sampler
draws, ``optimizer.learning_rate=1e-4:1e-2:log`` with ``--sampler=tpe --trials=20``. Each run is a
training command in a folder of its own, ``DIR/runs/NAME``. The command prints the table of all runs
and writes ``DIR/sweep.html``. After an interruption, the same command trains only what is left.
"""

from __future__ import annotations

from absl import flags

from moe_jax import signals
from moe_jax.cli import common
from moe_jax.sweeps.axes import axes_of
from moe_jax.sweeps.plan import METRICS
from moe_jax.sweeps.sampler import NAMES
from moe_jax.sweeps.sweep import Search, carried_out


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    common.define_config(values)
    common.define_workdir(values)
    flags.DEFINE_multi_string(
        "over",
        [],
        "Setting and its values: NAME=A,B, NAME=0..3, or NAME=LOW:HIGH[:log] for a sampler; seed "
        "stands for training.seed and data.seed.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "sampler",
        "grid",
        NAMES,
        "Choice of the runs: every combination of values (grid), or a sampler of Optuna.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "trials", 0, "Number of runs of a sampler.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_enum(
        "metric",
        "loss",
        [*METRICS],
        "Metric of the validation that runs are ranked by and a sampler improves.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "side_by_side",
        0,
        "Number of concurrent runs, which share cores and GPUs; 0 for one per GPU, and one without "
        "GPUs.",
        lower_bound=0,
        flag_values=values,
    )


def main(given: flags.FlagValues) -> None:
    """Trains the unfinished runs, and writes the table and the page."""
    signals.advise("run the same command to go on")
    common.experiment_of(given)  # rejects a wrong setting in the words of every command
    search = Search(given.sampler, given.trials, given.metric, given.side_by_side)
    config, folder = common.config_of(given), common.folder_of(given)
    carried_out(config, axes_of(given.over), folder, common.texts_of(given), search, common.say)


if __name__ == "__main__":
    common.run(define, main)
