"""Runs an ablation: ``moe-jax ablate --ablation=switch/capacity_factor``.

It trains every arm with every seed, skips what is finished, and writes ``results.jsonl``,
``report.md`` and figures to ``--output``. ``--ablation`` takes a name or a file, ``--workdir`` the
folder of all runs. Run the same command after an interruption to go on.
"""

from __future__ import annotations

from absl import flags

from moe_jax import signals
from moe_jax.ablation.ablation import SCALES
from moe_jax.ablation.intervals import MOST
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
    flags.DEFINE_enum("scale", "cpu", SCALES, "Sizes and budgets.", flag_values=values)
    flags.DEFINE_integer(
        "seeds",
        0,
        "Seeds; 0 for the ablation's own number.",
        lower_bound=0,
        upper_bound=MOST,
        flag_values=values,
    )
    flags.DEFINE_list("arms", [], "Only these arms.", flag_values=values)
    flags.DEFINE_integer(
        "side_by_side",
        0,
        "Runs at a time, with a share of cores and GPUs each; 0 for a core each at --scale=cpu.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "steps", 0, "Only so many steps, for a trial.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_bool("dry_run", False, "Print arms, sizes and time.", flag_values=values)


def main(given: flags.FlagValues) -> None:
    """Trains what is missing and writes the report."""
    signals.advise("run the same command to go on")
    wanted = study(
        given.ablation,
        workdir=given.workdir,
        scale=given.scale,
        seeds=given.seeds,
        arms=given.arms,
        steps=given.steps,
        side_by_side=given.side_by_side,
    )
    if given.dry_run:
        common.say(wanted.outline())
        return
    carried_out(wanted, given.workdir, given.output, common.say)


if __name__ == "__main__":
    common.run(define, main)
