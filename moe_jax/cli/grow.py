"""Adds or widens experts: ``moe-jax grow --input=runs/moe --output=runs/large --copies=2``.

Exactly one of ``--copies``, ``--parts``, ``--hidden`` and ``--copy`` selects the way. The command
says whether the function stays the same at the start, and why if it does not.
"""

from __future__ import annotations

from absl import flags

from moe_jax.cli import changed_models, common
from moe_jax.surgery.api import grow


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    changed_models.define_folders(values)
    changed_models.define_lookahead(values)
    changed_models.define_optimizer(values)
    changed_models.define_layers(values)
    for name, meaning in (
        ("copies", "Number of copies of each expert; k grows with it."),
        ("parts", "Number of parts into which each expert is cut; k grows with it."),
        ("hidden", "New hidden width of the experts."),
    ):
        flags.DEFINE_integer(name, 0, meaning, lower_bound=0, flag_values=values)
    flags.DEFINE_list(
        "copy", [], "Indices of experts that get one more copy; k stays.", flag_values=values
    )
    flags.DEFINE_float(
        "noise",
        0.0,
        "Deviation of the noise on each array of experts and router, as a share of its deviation.",
        lower_bound=0.0,
        flag_values=values,
    )
    flags.DEFINE_integer("seed", 0, "Seed of noise and new units.", flag_values=values)


def main(given: flags.FlagValues) -> None:
    """Writes the larger model."""
    changed = grow(
        **changed_models.folders_of(given),
        drop_lookahead=given.drop_lookahead,
        copies=given.copies,
        parts=given.parts,
        hidden=given.hidden,
        copy=changed_models.numbers(given, "copy"),
        layers=changed_models.layers_of(given),
        noise=given.noise,
        seed=given.seed,
        optimizer=given.optimizer,
    )
    common.say(str(changed))


if __name__ == "__main__":
    common.run(define, main)
