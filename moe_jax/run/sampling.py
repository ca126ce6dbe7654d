"""Text from a trained run, continued by a decoder or with its blanks filled by both stacks."""

from __future__ import annotations

import dataclasses

import numpy as np
from flax import nnx

from moe_jax import decoding
from moe_jax.decoding import Sampling
from moe_jax.models import Decoder, EncoderDecoder
from moe_jax.run.session import Session
from moe_jax.training.state import TrainState


def generate(
    session: Session, state: TrainState, prompts: list[str], sampling: Sampling
) -> list[str]:
    """Returns what the model makes of each prompt.

    A decoder continues it; the last ``seq_length`` tokens are read. An encoder-decoder fills in
    what ``<extra_id_0>``, ``<extra_id_1>``, ... stand for in it, as it was trained to.
    """
    model = nnx.merge(session.graph, state.params, state.router_state)
    sampling = dataclasses.replace(sampling, eos_id=session.tokenizer.eos_id)
    if isinstance(model, EncoderDecoder):
        return _filled(session, model, prompts, sampling)
    return _continued(session, model, prompts, sampling)


def _continued(
    session: Session, model: Decoder, prompts: list[str], sampling: Sampling
) -> list[str]:
    tokenizer, window = session.tokenizer, session.experiment.data.seq_length
    texts = [[tokenizer.bos_id, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
    added = decoding.generate(model, [text[-window:] for text in texts], sampling)
    whole = [(*text[1:], *more) for text, more in zip(texts, added, strict=True)]
    return [
        tokenizer.decode(np.array([t for t in row if t != tokenizer.eos_id], np.int32))
        for row in whole
    ]


def _filled(
    session: Session, model: EncoderDecoder, prompts: list[str], sampling: Sampling
) -> list[str]:
    tokenizer, window = session.tokenizer, session.experiment.data.seq_length - 1
    texts = [tokenizer.encode_blanks(prompt).tolist()[:window] for prompt in prompts]
    sources = [[*text, tokenizer.eos_id] for text in texts]
    found = decoding.translate(model, sources, sampling, start_id=tokenizer.pad_id)
    return [tokenizer.decode(np.array(row, np.int32)) for row in found]
