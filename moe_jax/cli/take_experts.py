"""Takes experts from another model or an older step of a run, into a new folder.

``moe-jax take_experts --input=runs/moe --other=runs/moe --other_step=200 --experts=3 --layers=1
--output=runs/back`` writes the newest model of the run with expert 3 of step 200 in layer 1.
"""

from __future__ import annotations

from absl import flags

from moe_jax.cli import changed_models, common
from moe_jax.surgery.compared import take_experts


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    changed_models.define_folders(values)
    changed_models.define_optimizer(values)
    changed_models.define_other(values)
    flags.DEFINE_list(
        "experts", None, "Indices of the experts to take.", required=True, flag_values=values
    )
    changed_models.define_layers(values)
    flags.DEFINE_boolean(
        "router",
        False,
        "Also take the parameters and the state of the router that belong to the experts.",
        flag_values=values,
    )


def main(given: flags.FlagValues) -> None:
    """Writes the model with the taken experts."""
    changed = take_experts(
        **changed_models.folders_of(given),
        other=given.other,
        other_step=given.other_step,
        experts=changed_models.numbers(given, "experts"),
        layers=changed_models.layers_of(given),
        router=given.router,
        optimizer=given.optimizer,
    )
    common.say(str(changed))


if __name__ == "__main__":
    common.run(define, main)
