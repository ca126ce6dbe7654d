"""Quantises experts: ``moe-jax quantise --input=runs/moe --output=runs/int4 --bits=int4``.

The weights of experts become int8, int4 or fp8 codes with scales. The router, the norms and all
other weights stay as they are.
"""

from __future__ import annotations

from absl import flags

from moe_jax.cli import changed_models, common
from moe_jax.quantised.codes import PRECISIONS
from moe_jax.surgery.quantising import quantise


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    changed_models.define_folders(values)
    changed_models.define_text(values)
    flags.DEFINE_enum(
        "bits",
        None,
        list(PRECISIONS),
        "Precision of the experts' weights; fp8 is e4m3.",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "group",
        0,
        "Number of input channels that share a scale; 0 for one scale per output channel.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_string(
        "calibration",
        "",
        "Text file from which factors of input channels are computed, or `validation` for the "
        "validation set of a run; by default no factors.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "budget",
        0,
        "Largest number of bytes of the experts; the least sensitive ones get int4, and the others "
        "--bits. 0 gives all experts --bits.",
        lower_bound=0,
        flag_values=values,
    )


def main(given: flags.FlagValues) -> None:
    """Writes the model with quantised experts."""
    changed = quantise(
        **changed_models.folders_of(given),
        **changed_models.text_of(given),
        bits=given.bits,
        group=given.group,
        calibration=given.calibration,
        budget=given.budget,
    )
    common.say(str(changed))


if __name__ == "__main__":
    common.run(define, main)
