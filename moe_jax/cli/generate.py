"""Samples text: ``moe-jax generate --workdir=runs/quickstart --prompt="def "``.

An encoder-decoder fills in blanks: ``--prompt="for i <extra_id_0> range(n):"``.

Nothing is dropped while sampling, so a text never depends on the others of its batch.
"""

from __future__ import annotations

import jax
from absl import flags

from moe_jax.cli import common
from moe_jax.decoding import Sampling
from moe_jax.run import workdir
from moe_jax.run.restored import open_restored
from moe_jax.run.sampling import check_can_generate, generate


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    common.define_workdir(values)
    flags.DEFINE_string(
        "prompt",
        "def ",
        "Text to continue, or with <extra_id_0>, ... to fill in.",
        flag_values=values,
    )
    flags.DEFINE_integer("tokens", 128, "Tokens to add at most.", lower_bound=1, flag_values=values)
    flags.DEFINE_float(
        "temperature", 0.8, "0 takes the best token.", lower_bound=0.0, flag_values=values
    )
    flags.DEFINE_integer(
        "top_k", 0, "Sample among the k best; 0 for all.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_float(
        "top_p",
        1.0,
        "Sample among the fewest tokens that are together so likely; 1 for all.",
        flag_values=values,
    )
    flags.DEFINE_integer("seed", 0, "Of the samples.", flag_values=values)
    flags.DEFINE_integer("samples", 1, "Texts to sample.", lower_bound=1, flag_values=values)


def main(given: flags.FlagValues) -> None:
    """Restores the newest checkpoint and prints samples."""
    sampling = Sampling(given.tokens, given.temperature, given.top_k, given.top_p, given.seed)
    folder = common.folder_of(given)
    check_can_generate(workdir.load(folder).model)
    _, session, state = open_restored(folder)
    with jax.set_mesh(session.mesh):
        for text in generate(session, state, [given.prompt] * given.samples, sampling):
            print(text)


if __name__ == "__main__":
    common.run(define, main)
