"""Runs an ablation: ``moe-jax ablate --ablation=switch/capacity_factor``.

The command trains every arm with every seed, skips finished runs, and writes ``results.jsonl``,
``report.md`` and figures to ``--output``. ``--ablation`` is a name or a file, and ``--workdir`` the
folder of all runs. After an interruption, the same command resumes the runs.
"""

from __future__ import annotations

from absl import flags

from moe_jax import signals
from moe_jax.ablation.ablation import SCALES
from moe_jax.ablation.reproduce import carried_out, study
from moe_jax.cli import common


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "ablation", None, "Name or file of the ablation.", required=True, flag_values=values
    )
    flags.DEFINE_string("workdir", "runs/ablations", "Folder of all runs.", flag_values=values)
    flags.DEFINE_string(
        "output", None, "Folder of the report; WORKDIR/NAME by default.", flag_values=values
    )
    flags.DEFINE_string(
        "records",
        None,
        "results.jsonl of an earlier command, whose runs are not trained again; committed for the "
        "records of the package.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "scale", "cpu", SCALES, "Scale of model sizes and budgets.", flag_values=values
    )
    flags.DEFINE_integer(
        "seeds",
        0,
        "Number of seeds; 0 for the number that the ablation sets.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_list("arms", [], "Arms to run; all by default.", flag_values=values)
    flags.DEFINE_integer(
        "side_by_side",
        0,
        "Number of concurrent runs, which share cores and GPUs; 0 for one per core at --scale=cpu.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "steps",
        0,
        "Number of steps of each run, for a trial; 0 for the steps of the scale.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_bool(
        "dry_run",
        False,
        "Print arms, sizes and estimated time, and train nothing.",
        flag_values=values,
    )


def main(given: flags.FlagValues) -> None:
    """Trains the unfinished runs and writes the report."""
    signals.advise("run the same command to go on")
    wanted = study(
        given.ablation,
        workdir=given.workdir,
        scale=given.scale,
        seeds=given.seeds,
        arms=given.arms,
        steps=given.steps,
        side_by_side=given.side_by_side,
        records=given.records,
    )
    if given.dry_run:
        common.say(wanted.outline())
        return
    carried_out(wanted, given.workdir, given.output, common.say)


if __name__ == "__main__":
    common.run(define, main)
