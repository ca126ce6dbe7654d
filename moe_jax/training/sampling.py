"""Text from a trained run."""

from __future__ import annotations

import dataclasses

import numpy as np
from flax import nnx

from moe_jax import decoding
from moe_jax.decoding import Sampling
from moe_jax.training.session import Session
from moe_jax.training.state import TrainState


def generate(
    session: Session, state: TrainState, prompts: list[str], sampling: Sampling
) -> list[str]:
    """Returns each prompt with its continuation; the last ``seq_length`` tokens of it are read."""
    tokenizer, window = session.tokenizer, session.experiment.data.seq_length
    model = nnx.merge(session.graph, state.params, state.router_state)
    texts = [[tokenizer.bos_id, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
    sampling = dataclasses.replace(sampling, eos_id=tokenizer.eos_id)
    added = decoding.generate(model, [text[-window:] for text in texts], sampling)
    whole = [(*text[1:], *more) for text, more in zip(texts, added, strict=True)]
    return [
        tokenizer.decode(np.array([t for t in row if t != tokenizer.eos_id], np.int32))
        for row in whole
    ]
