"""Generation of tokens with a cache, for decoders and encoder-decoders.

Prompts of unequal length are padded in front. Every expert has as many slots as there are tokens
(``moe_jax.nn.mode.DECODE``), so no token is dropped and no row depends on other rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, EncoderDecoder, Model
from moe_jax.models.cache import Cache
from moe_jax.nn.mode import DECODE
from moe_jax.nn.positions import Learned
from moe_jax.parallel.rules import platform
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

EndId = Annotated[int, Range(0, LARGEST, also=(-1,))]


# Number of tokens per block, of which the most likely one is found first.
_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Sampling(Ranged):
    """Settings of sampling.

    Attributes:
        tokens: Largest number of sampled tokens per text.
        temperature: Temperature of the distribution; 0 takes the most likely token.
        top_k: Number of most likely tokens among which one is sampled; 0 for all.
        top_p: Probability of the smallest set of most likely tokens among which one is sampled; 1
            for all.
        seed: Seed of the samples.
        eos_id: Id of the token that ends a text, or ids of several such tokens; -1 for none.
    """

    tokens: Positive = 128
    temperature: NonNegative = 0.8
    top_k: Natural = 0
    top_p: PositiveShare = 1.0
    seed: Seed = 0
    eos_id: EndId | tuple[EndId, ...] = -1

    def __post_init__(self):
        if isinstance(self.eos_id, list):  # Compiled programs need settings that have a hash.
            object.__setattr__(self, "eos_id", tuple(self.eos_id))
        super().__post_init__()

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids of all tokens that end a text."""
        ids = self.eos_id if isinstance(self.eos_id, tuple) else (self.eos_id,)
        return tuple(each for each in ids if each != -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """The way to sample, by row.

    Attributes:
        temperature: Temperatures ``(B,)`` float32; 0 takes the most likely token.
        top_k: Numbers ``(B,)`` int32 of most likely tokens; 0 for all.
        top_p: Probabilities ``(B,)`` float32 of the sets of most likely tokens; 1 for all.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]


def choose(logits: Float[Array, "B V"], sampling: Sampling, key: PRNGKeyArray) -> Int[Array, " B"]:
    """Returns sampled tokens ``(B,)`` int32 for float32 logits ``(B, V)``."""
    if sampling.temperature == 0:
        return _most_likely(logits)
    heated = logits / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        heated = _cut(heated, sampling.top_k, sampling.top_p)
    return jax.random.categorical(key, heated).astype(jnp.int32)


def choose_by_row(
    logits: Float[Array, "B V"], rules: Rules, keys: Key[Array, " B"]
) -> Int[Array, " B"]:
    """Returns sampled tokens ``(B,)`` int32; ``choose`` samples the same token of a row alone.

    Args:
        logits: Float32 logits ``(B, V)``.
        rules: Way to sample each row.
        keys: Random key of each row.
    """
    greedy, best = rules.temperature == 0, _most_likely(logits)

    def drawn() -> Array:
        heated = logits / jnp.where(greedy, 1.0, rules.temperature)[:, None]
        top_k, top_p = rules.top_k[:, None], rules.top_p[:, None]
        any_cut = ((rules.top_k > 0) | (rules.top_p < 1)).any()
        heated = jax.lax.cond(any_cut, lambda: _cut(heated, top_k, top_p), lambda: heated)
        return jax.vmap(jax.random.categorical)(keys, heated).astype(jnp.int32)

    # Random numbers for the whole vocabulary cost more than the rest of the choice.
    return jax.lax.cond(greedy.all(), lambda: best, lambda: jnp.where(greedy, best, drawn()))


def _most_likely(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Returns the first of the most likely tokens of each row."""
    rows, tokens = logits.shape
    if platform() != "cpu" or tokens % _BLOCK:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # A CPU finds the largest numbers of blocks faster than the place of one.
    blocks = logits.reshape(rows, -1, _BLOCK)
    block = jnp.argmax(blocks.max(axis=-1), axis=-1)
    own = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * _BLOCK + jnp.argmax(own, axis=-1)).astype(jnp.int32)


def _cut(
    logits: Float[Array, "B V"],
    top_k: Int[Array, "B 1"] | int,
    top_p: Float[Array, "B 1"] | float,
) -> Float[Array, "B V"]:
    """Returns the logits of the tokens that may be sampled, and minus infinity for the others."""
    # Equally likely tokens keep their order, as in argmax.
    order = jnp.argsort(-logits, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    logits = jnp.where((rank < top_k) | (jnp.asarray(top_k) == 0), logits, -jnp.inf)
    share = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.pad(jnp.cumsum(share, axis=-1), ((0, 0), (1, 0)))[:, :-1]
    number = (before < top_p).sum(-1, keepdims=True)
    return jnp.where((rank < number) | (jnp.asarray(top_p) >= 1), logits, -jnp.inf)


def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[int]]:
    """Returns the tokens that a decoder samples after each prompt, including the end token.

    Raises:
        ConfigError: If there is no prompt, if a prompt is empty, or if prompt and sample are longer
            than the learned positions.
    """
    tokens, segments = padded(prompts, in_front=True)
    _check_length(model, tokens.shape[1] + sampling.tokens)
    sampled = _generate(model, jnp.asarray(tokens), jnp.asarray(segments), sampling)
    return _ended(np.asarray(sampled), sampling.eos_ids)


def translate(
    model: EncoderDecoder, sources: Sequence[Sequence[int]], sampling: Sampling, start_id: int = 0
) -> list[list[int]]:
    """Returns the tokens that an encoder-decoder samples for each text, including the end token.

    Args:
        model: Encoder-decoder.
        sources: Token ids of the texts that the encoder reads.
        sampling: Settings of sampling.
        start_id: First input of the decoder (T5's padding token, 0).

    Raises:
        ConfigError: If there is no text, if a text is empty, or if a text or the sample is longer
            than the learned positions.
    """
    tokens, segments = padded(sources, in_front=False)
    _check_length(model, max(tokens.shape[1], sampling.tokens))
    sampled = _translate(model, jnp.asarray(tokens), jnp.asarray(segments), sampling, start_id)
    return _ended(np.asarray(sampled), sampling.eos_ids)


def padded(rows: Sequence[Sequence[int]], *, in_front: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``tokens`` and ``segments``, each ``(B, L)`` int32 and padded with 0.

    Raises:
        ConfigError: If there is no row, or a row is empty.
    """
    if not rows or not all(len(row) for row in rows):
        raise ConfigError("every prompt needs at least one token: start it with a begin token")
    length = max(map(len, rows))
    tokens, segments = np.zeros((2, len(rows), length), np.int32)
    for i, row in enumerate(rows):
        columns = slice(length - len(row), length) if in_front else slice(0, len(row))
        tokens[i, columns], segments[i, columns] = row, 1
    return tokens, segments


def positions_of(segments: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Returns for each token the number of earlier tokens of its row, without padding."""
    return jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)


class _Extend(Protocol):
    """A function that reads one token ``(B, 1)`` per row at its position ``(B, 1)``."""

    def __call__(self, token: Array, position: Array, cache: Cache) -> tuple[Array, Cache]:
        """Returns hidden states ``(B, 1, M)`` and the cache with these tokens."""


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
    position, cache = jnp.zeros_like(first), model.empty_cache(batch, sampling.tokens + 1)
    one = jnp.ones_like(first)
    hidden, cache = model.extend(first, one, position, cache, segments, memory=memory)

    def extend(token: Array, position: Array, cache: Cache) -> tuple[Array, Cache]:
        return model.extend(token, one, position, cache, segments)

    return _loop(model, extend, hidden, position + 1, cache, sampling)


def _loop(
    model: Model,
    extend: _Extend,
    hidden: Array,
    position: Array,
    cache: Cache,
    sampling: Sampling,
) -> Array:
    """Returns sampled tokens ``(B, tokens)`` int32, -1 after the end token.

    Args:
        model: Model whose head gives the logits.
        extend: Function that reads one token per row.
        hidden: Last hidden states ``(B, 1, M)``.
        position: Positions ``(B, 1)`` of the first sampled tokens.
        cache: Cache of all tokens before the sample.
        sampling: Settings of sampling.
    """
    batch = hidden.shape[0]
    keys = jax.random.split(jax.random.key(sampling.seed), sampling.tokens)
    sampled = jnp.full((batch, sampling.tokens), -1, jnp.int32)

    def unfinished(carry: tuple[Any, ...]) -> Array:
        step, _, _, _, ended, _ = carry
        return (step < sampling.tokens) & ~ended.all()

    def one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, hidden, position, cache, ended, sampled = carry
        token = choose(model.logits(hidden)[:, 0], sampling, keys[step])
        sampled = sampled.at[:, step].set(jnp.where(ended, -1, token))
        ended |= jnp.isin(token, jnp.array(sampling.eos_ids, jnp.int32))
        hidden, cache = extend(token[:, None], position, cache)
        return step + 1, hidden, position + 1, cache, ended, sampled

    ended = jnp.zeros(batch, bool)
    return jax.lax.while_loop(unfinished, one, (0, hidden, position, cache, ended, sampled))[-1]


def _check_length(model: Model, length: int) -> None:
    positions = model.config.positions
    if isinstance(positions, Learned) and length > positions.length:
        raise ConfigError(
            f"prompt and sample are {length} tokens, and the model has learned "
            f"{positions.length} positions: shorten one of them"
        )


def _ended(sampled: np.ndarray, eos_ids: Sequence[int]) -> list[list[int]]:
    """Returns the rows of ``sampled (B, tokens)``, each cut after its first end token."""
    rows = []
    for row in sampled.tolist():
        tokens = row[: row.index(-1)] if -1 in row else row
        ends = (place + 1 for place, token in enumerate(tokens) if token in eos_ids)
        rows.append(tokens[: next(ends, None)])
    return rows
