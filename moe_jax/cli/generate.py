"""Samples text from a run: ``moe-jax generate --workdir=runs/quickstart --prompt="def "``.

``--chat`` writes the prompt in the chat template of the tokenizer.

An encoder-decoder fills blanks: ``--prompt="for i <extra_id_0> range(n):"``.

No token is dropped while sampling, so the texts of a batch are independent of each other.
"""

from __future__ import annotations

import jax
from absl import flags

from moe_jax.cli import common
from moe_jax.data import chat_prompt
from moe_jax.decoding import Sampling
from moe_jax.run import workdir
from moe_jax.run.restored import open_restored
from moe_jax.run.sampling import check_can_generate, generate


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    common.define_workdir(values)
    common.define_step(values)
    common.define_average(values)
    flags.DEFINE_string(
        "prompt",
        "def ",
        "Text to continue, or text with blanks <extra_id_0>, ... to fill.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "chat",
        False,
        "True makes the prompt the message of a user, in the chat template of the tokenizer.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "tokens", 128, "Largest number of tokens to add.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_float(
        "temperature",
        0.8,
        "Sampling temperature; 0 takes the most probable token.",
        lower_bound=0.0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "top_k",
        0,
        "Number of most probable tokens to sample from; 0 for all.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_float(
        "top_p",
        1.0,
        "Probability mass of the smallest set of tokens to sample from; 1 for all.",
        lower_bound=0.0,
        upper_bound=1.0,
        flag_values=values,
    )
    flags.DEFINE_integer("seed", 0, "Random seed of the samples.", flag_values=values)
    flags.DEFINE_integer(
        "samples", 1, "Number of texts to sample.", lower_bound=1, flag_values=values
    )


def main(given: flags.FlagValues) -> None:
    """Restores a checkpoint and prints samples."""
    sampling = Sampling(given.tokens, given.temperature, given.top_k, given.top_p, given.seed)
    folder = common.folder_of(given)
    check_can_generate(workdir.load(folder).model)
    _, session, state = open_restored(folder, given.step, average=given.average)
    prompt = given.prompt
    if given.chat:
        prompt = chat_prompt(session.tokenizer, [{"role": "user", "content": prompt}])
    with jax.set_mesh(session.mesh):
        for text in generate(session, state, [prompt] * given.samples, sampling):
            print(text)


if __name__ == "__main__":
    common.run(define, main)
