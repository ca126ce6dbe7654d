"""Makes a student: ``moe-jax distil --input=runs/moe --output=runs/student --experts=1``.

The written run starts at step 0 from the teacher's experts, and ``moe-jax train`` trains it with
the teacher's probabilities as soft targets.
"""

from __future__ import annotations

from absl import flags

from moe_jax.cli import changed_models, common
from moe_jax.surgery.api import distil


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    changed_models.define_folders(values)
    changed_models.define_lookahead(values)
    changed_models.define_text(values)
    flags.DEFINE_integer(
        "experts",
        None,
        "Number of experts of a layer, or of groups of experts in a dense network.",
        lower_bound=1,
        required=True,
        flag_values=values,
    )
    for name, choices, meaning in (
        ("student", ["dense", "mixture"], "Form of the student."),
        ("start", ["merge", "prune"], "Fate of the less used experts: merged or left out."),
    ):
        flags.DEFINE_enum(name, choices[0], choices, meaning, flag_values=values)
    flags.DEFINE_float(
        "weight",
        0.5,
        "Weight of the cross-entropy with the teacher's probabilities.",
        lower_bound=0.0,
        upper_bound=1.0,
        flag_values=values,
    )
    flags.DEFINE_float(
        "temperature",
        1.0,
        "Temperature of the cross-entropy with the teacher.",
        lower_bound=0.0,
        flag_values=values,
    )
    flags.DEFINE_float(
        "routing",
        0.0,
        "Weight of the divergence of a mixture's routing distributions from the teacher's.",
        lower_bound=0.0,
        flag_values=values,
    )


def main(given: flags.FlagValues) -> None:
    """Writes the student."""
    changed = distil(
        **changed_models.folders_of(given),
        drop_lookahead=given.drop_lookahead,
        **changed_models.text_of(given),
        experts=given.experts,
        student=given.student,
        start=given.start,
        weight=given.weight,
        temperature=given.temperature,
        routing=given.routing,
    )
    common.say(str(changed))


if __name__ == "__main__":
    common.run(define, main)
