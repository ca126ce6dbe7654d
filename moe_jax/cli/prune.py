"""Leaves experts out: ``moe-jax prune --input=runs/moe --output=runs/small --experts=4``.

``--by`` selects the score by which experts stay: their share of the choices (load) or of the gates
(gate), the mean of gate times norm of the output (output), or the loss without them (loss).
"""

from __future__ import annotations

from absl import flags

from moe_jax.cli import changed_models, common
from moe_jax.surgery.api import prune


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    changed_models.define_folders(values)
    changed_models.define_lookahead(values)
    changed_models.define_optimizer(values)
    changed_models.define_text(values)
    flags.DEFINE_integer(
        "experts",
        None,
        "Number of experts that a layer keeps; the mean over layers with --across.",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_enum(
        "by", "load", ["load", "gate", "output", "loss"], "Score of an expert.", flag_values=values
    )
    flags.DEFINE_boolean(
        "across", False, "Compare the experts of all layers together.", flag_values=values
    )


def main(given: flags.FlagValues) -> None:
    """Writes the model with fewer experts."""
    changed = prune(
        **changed_models.folders_of(given),
        drop_lookahead=given.drop_lookahead,
        **changed_models.text_of(given),
        experts=given.experts,
        by=given.by,
        across=given.across,
        optimizer=given.optimizer,
    )
    common.say(str(changed))


if __name__ == "__main__":
    common.run(define, main)
