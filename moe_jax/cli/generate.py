"""Samples text from a run: ``moe-jax generate --workdir=runs/quickstart --prompt="def "``.

``--model=DIR`` reads a run, a converted model or a model of transformers. ``--stream`` prints the
text while it is sampled. ``--chat`` writes the prompt in the chat template of the tokenizer, and
``--turns`` answers the lines of the standard input too, as a chat.

An encoder-decoder fills blanks: ``--prompt="for i <extra_id_0> range(n):"``.

No token is dropped while sampling, so the texts of a batch are independent of each other.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable

import jax
import numpy as np
from absl import flags

from moe_jax.cli import common, drafting, offloading
from moe_jax.data import Tokenizer, chat_prompt, end_ids
from moe_jax.decoding import Sampling
from moe_jax.errors import ConfigError
from moe_jax.models import ModelConfig
from moe_jax.run import workdir
from moe_jax.run.opened import FolderModel, open_folder
from moe_jax.run.restored import open_restored
from moe_jax.run.sampling import check_can_generate, generate, texts
from moe_jax.serving import engines
from moe_jax.serving.asking import encoded
from moe_jax.serving.engines import Room
from moe_jax.serving.request import Request
from moe_jax.serving.talk import parts, talk


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_string(
        "model", None, "Folder of any model, in place of --workdir.", flag_values=values
    )
    common.define_step(values)
    common.define_average(values)
    common.define_routing_table(values)
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
    for name, meaning in (
        ("stream", "True prints the text while it is sampled."),
        ("turns", "True answers the prompt and then each line of the standard input, as a chat."),
    ):
        flags.DEFINE_bool(name, False, meaning, flag_values=values)
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
    drafting.define(values)
    offloading.define(values)
    flags.DEFINE_integer(
        "samples", 1, "Number of texts to sample.", lower_bound=1, flag_values=values
    )


def main(given: flags.FlagValues) -> None:
    """Opens a model and prints samples."""
    sampling = Sampling(given.tokens, given.temperature, given.top_k, given.top_p, given.seed)
    if given.model and given.workdir:
        raise ConfigError("--model and --workdir name two folders: give one of them")
    if given.stream or given.turns:
        _stream(given, sampling)
    elif given.draft or given.expert_bytes:
        name = "draft" if given.draft else "expert_bytes"
        raise ConfigError(f"--{name}={given[name].value} needs --stream or --turns: add one")
    elif given.model or given.routing_table:
        _any_model(given, sampling)
    else:
        _run(given, sampling)


def _run(given: flags.FlagValues, sampling: Sampling) -> None:
    """Prints samples of a run, whose corpus must be there."""
    folder = common.folder_of(given)
    check_can_generate(workdir.load(folder).model)
    _, session, state = open_restored(folder, given.step, average=given.average)
    prompt = _prompt(given, session.tokenizer)
    with jax.set_mesh(session.mesh):
        for text in generate(session, state, [prompt] * given.samples, sampling):
            print(text)


def _any_model(given: flags.FlagValues, sampling: Sampling) -> None:
    """Prints samples of any folder."""
    opened = _opened(given, check_can_generate)
    tokenizer = _tokenizer(opened)
    prompts = [_prompt(given, tokenizer)] * given.samples
    with opened.on_mesh():
        for text in texts(opened.model, tokenizer, prompts, sampling, opened.window):
            print(text)


def _opened(given: flags.FlagValues, check: Callable[[ModelConfig], None]) -> FolderModel:
    return open_folder(
        given.model or common.folder_of(given),
        given.step,
        check,
        average=given.average,
        routing_table=given.routing_table,
    )


def _stream(given: flags.FlagValues, sampling: Sampling) -> None:
    """Prints a text, or the answers of a chat, while they are sampled."""
    if given.samples != 1:
        raise ConfigError(f"--samples={given.samples} is for whole texts: leave --stream out")
    offloading.check(given)
    opened = _opened(given, drafting.check_of(given))
    tokenizer, window = _tokenizer(opened), opened.window
    sampling = dataclasses.replace(sampling, eos_id=end_ids(tokenizer))
    prompt = encoded(tokenizer, _prompt(given, tokenizer))[-window:]
    context = (window if given.turns else len(prompt)) + sampling.tokens
    opened.model.config.check_length(context, "the length of prompt and sample")
    with opened.on_mesh():
        drafts = drafting.speculation_of(given)
        offload = offloading.offload_of(given, opened.model)
        room = Room(1, 0, context, speculation=drafts, offload=offload)
        engine = engines.engine_of(opened, room)
        if given.turns:
            lines = itertools.chain([given.prompt], sys.stdin)
            said = talk(engine, tokenizer, lines, sampling, window)
        else:
            before = tokenizer.decode(np.array(prompt[1:], np.int32))
            after = parts(engine, tokenizer, Request(prompt, sampling))
            said = itertools.chain([before], after, ["\n"])
        for part in said:
            print(part, end="", flush=True)


def _tokenizer(opened: FolderModel) -> Tokenizer:
    assert opened.tokenizer is not None  # ``open_folder`` has checked it.
    return opened.tokenizer


def _prompt(given: flags.FlagValues, tokenizer: Tokenizer) -> str:
    if not given.chat:
        return given.prompt
    return chat_prompt(tokenizer, [{"role": "user", "content": given.prompt}])


if __name__ == "__main__":
    common.run(define, main)
