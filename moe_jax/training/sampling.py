"""Sampling from a causal model, each new token from a pass over the whole window."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.nn.mode import DECODE
from moe_jax.training.session import Session
from moe_jax.training.state import TrainState

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes:
        tokens: to add at most; a text ends early at its end token.
        temperature: 0 takes the best token.
        top_k: sample among the k best; 0 for all.
        seed: of the samples.
    """

    tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    seed: int = 0


def generate(
    session: Session, state: TrainState, prompts: list[str], sampling: Sampling
) -> list[str]:
    """Returns each prompt with its continuation; the last ``seq_length`` tokens are seen."""
    tokenizer, window = session.tokenizer, session.experiment.data.seq_length
    texts = [[tokenizer.bos_id, *tokenizer.encode(prompt).tolist()] for prompt in prompts]

    def next_tokens(params: nnx.State, router_state: nnx.State, inputs: Array, ends: Array, key):
        model = nnx.merge(session.graph, params, router_state)
        place = jnp.broadcast_to(jnp.arange(window, dtype=jnp.int32), inputs.shape)
        segments = (place < ends[:, None]).astype(jnp.int32)
        hidden, _ = model.hidden(inputs, segments, place, mode=DECODE)
        last = jnp.take_along_axis(hidden, (ends - 1)[:, None, None], axis=1)
        return choose(model.logits(last)[:, 0], sampling, key)

    step = jax.jit(next_tokens)
    keys = jax.random.split(jax.random.key(sampling.seed), sampling.tokens)
    for key in keys:
        rows = [text[-window:] for text in texts]
        inputs = np.zeros((len(rows), window), np.int32)
        for row, tokens in zip(inputs, rows, strict=True):
            row[: len(tokens)] = tokens
        ends = np.array([len(row) for row in rows], np.int32)
        found = np.asarray(step(state.params, state.router_state, inputs, ends, key))
        for text, token in zip(texts, found.tolist(), strict=True):
            if text[-1] != tokenizer.eos_id:
                text.append(token)
        if all(text[-1] == tokenizer.eos_id for text in texts):
            break
    return [
        tokenizer.decode(np.array([t for t in text[1:] if t != tokenizer.eos_id], np.int32))
        for text in texts
    ]


def choose(logits: Array, sampling: Sampling, key: Array) -> Array:
    """Returns a token ``(B,)`` for logits ``(B, V)``."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    if 0 < sampling.top_k < logits.shape[-1]:
        worst = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < worst, -jnp.inf, logits)
    return jax.random.categorical(key, logits / sampling.temperature)
