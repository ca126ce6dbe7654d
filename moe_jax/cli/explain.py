"""Explains one text: ``moe-jax explain --model=runs/quickstart --prompt="def f(x):"``.

For every token and every layer with experts the output has the experts, their gates, the norm of
their contributions, and the change of the next token's log-likelihood if the expert is removed
there. The page needs no network; the numbers lie beside it as JSON.
"""

from __future__ import annotations

from absl import flags

from moe_jax.analysis.explained import PAGE, lines, write_explanation
from moe_jax.cli import common, inspected
from moe_jax.run.explaining import explain


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    inspected.define_model(values, PAGE)
    flags.DEFINE_string(
        "prompt",
        None,
        "Text to explain, or text with blanks <extra_id_0>, ... for an encoder-decoder.",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_string(
        "target",
        None,
        "Text that the decoder of an encoder-decoder writes; by default its most probable answer.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "batch_size",
        16,
        "Number of forward passes, each without one expert, that are computed at once.",
        lower_bound=1,
        flag_values=values,
    )


def main(given: flags.FlagValues) -> None:
    """Prints the explanation, writes the page and the JSON file, and prints their paths."""
    inspected.check_output(given.output, given.model)
    found = explain(
        given.model,
        given.prompt,
        target=given.target,
        step=given.step,
        batch_size=given.batch_size,
    )
    files = write_explanation(found, given.output, f"Experts of a text under {given.model}")
    inspected.say_all(lines(found), files)


if __name__ == "__main__":
    common.run(define, main)
