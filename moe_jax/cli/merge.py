"""Merges similar experts: ``moe-jax merge --input=runs/moe --output=runs/small --experts=4``."""

from __future__ import annotations

from absl import flags

from moe_jax.cli import changed_models, common
from moe_jax.surgery.api import merge


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
    flags.DEFINE_boolean(
        "across",
        False,
        "Take the most used experts of all layers as heads of groups.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "redirect",
        False,
        "Keep all logits of the router: the choices of merged experts go to one network.",
        flag_values=values,
    )


def main(given: flags.FlagValues) -> None:
    """Writes the model with merged experts."""
    changed = merge(
        **changed_models.folders_of(given),
        drop_lookahead=given.drop_lookahead,
        **changed_models.text_of(given),
        experts=given.experts,
        across=given.across,
        redirect=given.redirect,
        optimizer=given.optimizer,
    )
    common.say(str(changed))


if __name__ == "__main__":
    common.run(define, main)
