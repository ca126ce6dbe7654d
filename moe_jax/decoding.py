"""Generating tokens with a cache, for decoders and encoder-decoders.

Prompts of unequal length are padded in front. Routing runs with as many slots as tokens
(``moe_jax.nn.mode.DECODE``), so nothing is dropped and no row depends on the others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, EncoderDecoder, Model
from moe_jax.models.cache import Cache
from moe_jax.nn.mode import DECODE
from moe_jax.nn.positions import Learned
from moe_jax.ranges import (
    LARGEST,
    Natural,
    NonNegative,
    Positive,
    PositiveShare,
    Range,
    Ranged,
    Seed,
)

Array = jax.Array
EndId = Annotated[int, Range(0, LARGEST, also=(-1,))]


@dataclasses.dataclass(frozen=True)
class Sampling(Ranged):
    """How to sample.

    Attributes:
        tokens: to add at most.
        temperature: 0 takes the best token.
        top_k: sample among the k best; 0 for all.
        top_p: sample among the fewest that are together at least so likely; 1 for all.
        seed: of the samples.
        eos_id: a text ends there; -1 for never.
    """

    tokens: Positive = 128
    temperature: NonNegative = 0.8
    top_k: Natural = 0
    top_p: PositiveShare = 1.0
    seed: Seed = 0
    eos_id: EndId = -1


def choose(logits: Array, sampling: Sampling, key: Array) -> Array:
    """Returns a token ``(B,)`` int32 for float32 logits ``(B, V)``."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    # Of equally likely tokens the first come first, as for argmax.
    order = jnp.argsort(-logits, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    if sampling.top_k:
        logits = jnp.where(rank < sampling.top_k, logits, -jnp.inf)
    if sampling.top_p < 1:
        share = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.pad(jnp.cumsum(share, axis=-1), ((0, 0), (1, 0)))[:, :-1]
        kept = (before < sampling.top_p).sum(-1, keepdims=True)
        logits = jnp.where(rank < kept, logits, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[int]]:
    """Returns what a decoder adds to each prompt, up to and with its end token.

    Raises:
        ConfigError: if there is no prompt, one is empty, or they are longer than learned positions.
    """
    tokens, segments = padded(prompts, in_front=True)
    _check_length(model, tokens.shape[1] + sampling.tokens)
    found = _generate(model, jnp.asarray(tokens), jnp.asarray(segments), sampling)
    return _ended(np.asarray(found), sampling.eos_id)


def translate(
    model: EncoderDecoder, sources: Sequence[Sequence[int]], sampling: Sampling, start_id: int = 0
) -> list[list[int]]:
    """Returns what an encoder-decoder makes of each source, up to and with its end token.

    Args:
        model: the model.
        sources: token ids of the encoder.
        sampling: how to sample.
        start_id: the decoder's first input (T5: its padding token, 0).

    Raises:
        ConfigError: as ``generate``.
    """
    tokens, segments = padded(sources, in_front=False)
    _check_length(model, max(tokens.shape[1], sampling.tokens))
    found = _translate(model, jnp.asarray(tokens), jnp.asarray(segments), sampling, start_id)
    return _ended(np.asarray(found), sampling.eos_id)


def padded(rows: Sequence[Sequence[int]], *, in_front: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``tokens`` and ``segments (B, L)`` int32, padded with 0."""
    if not rows or not all(len(row) for row in rows):
        raise ConfigError("every prompt needs at least one token: start it with a begin token")
    length = max(map(len, rows))
    tokens, segments = np.zeros((2, len(rows), length), np.int32)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if in_front else slice(0, len(row))
        tokens[i, place], segments[i, place] = row, 1
    return tokens, segments


def positions_of(segments: Array) -> Array:
    """Returns ``(B, L)`` int32: how many real tokens of the row stand before each."""
    return jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)


@functools.partial(jax.jit, static_argnames="sampling")
def _generate(model: Decoder, tokens: Array, segments: Array, sampling: Sampling) -> Array:
    batch, length = tokens.shape
    positions = positions_of(segments)
    cache = model.empty_cache(batch, length + sampling.tokens)
    hidden, cache = model.extend(tokens, segments, positions, cache)

    def extend(token: Array, position: Array, cache: Cache) -> tuple[Array, Cache]:
        return model.extend(token, jnp.ones_like(token), position, cache)

    return _loop(model, extend, hidden[:, -1:], positions[:, -1:] + 1, cache, sampling)


@functools.partial(jax.jit, static_argnames=("sampling", "start_id"))
def _translate(
    model: EncoderDecoder, tokens: Array, segments: Array, sampling: Sampling, start_id: int
) -> Array:
    batch = tokens.shape[0]
    memory, _ = model.encode(tokens, segments, positions=positions_of(segments), mode=DECODE)
    first = jnp.full((batch, 1), start_id, jnp.int32)
    place, cache = jnp.zeros_like(first), model.empty_cache(batch, sampling.tokens + 1)
    one = jnp.ones_like(first)
    hidden, cache = model.extend(first, one, place, cache, segments, memory=memory)

    def extend(token: Array, position: Array, cache: Cache) -> tuple[Array, Cache]:
        return model.extend(token, one, position, cache, segments)

    return _loop(model, extend, hidden, place + 1, cache, sampling)


def _loop(model: Model, extend, hidden: Array, position: Array, cache: Cache, sampling: Sampling):
    """Samples ``(B, tokens)`` int32 from the last hidden state ``(B, 1, M)``; -1 after the end."""
    batch = hidden.shape[0]
    keys = jax.random.split(jax.random.key(sampling.seed), sampling.tokens)
    found = jnp.full((batch, sampling.tokens), -1, jnp.int32)

    def going(carry) -> Array:
        step, _, _, _, ended, _ = carry
        return (step < sampling.tokens) & ~ended.all()

    def one(carry):
        step, hidden, position, cache, ended, found = carry
        token = choose(model.logits(hidden)[:, 0], sampling, keys[step])
        found = found.at[:, step].set(jnp.where(ended, -1, token))
        ended |= token == sampling.eos_id
        hidden, cache = extend(token[:, None], position, cache)
        return step + 1, hidden, position + 1, cache, ended, found

    ended = jnp.zeros(batch, bool)
    return jax.lax.while_loop(going, one, (0, hidden, position, cache, ended, found))[-1]


def _check_length(model: Model, length: int) -> None:
    positions = model.config.positions
    if isinstance(positions, Learned) and length > positions.length:
        raise ConfigError(
            f"prompt and sample are {length} tokens, and the model has learned "
            f"{positions.length} positions: shorten one of them"
        )


def _ended(found: np.ndarray, eos_id: int) -> list[list[int]]:
    rows = []
    for row in found.tolist():
        kept = row[: row.index(-1)] if -1 in row else row
        rows.append(kept[: kept.index(eos_id) + 1] if eos_id in kept else kept)
    return rows
