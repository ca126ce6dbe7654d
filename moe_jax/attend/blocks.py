"""Attention by XLA, in blocks of queries, so that no scores of a long sequence exist as a whole."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.attend.options import Options
from moe_jax.attend.view import View
from moe_jax.parallel import axis_size, constrain
from moe_jax.precision import wide_einsum

# A block has at most this number of scores per head; a sequence of 1,024 tokens is one block.
SCORES = 2**20


def attend(
    q: Float[Array, "B H L D"],
    k: Float[Array, "B G T D"],
    v: Float[Array, "B G T V"],
    sinks: Float[Array, " H"] | None,
    view: View,
    options: Options,
    most: int = SCORES,
) -> Float[Array, "B H L V"]:
    """Returns the mixed values ``(B, H, L, V)`` of all queries; see ``moe_jax.attend.attend``.

    Several query heads share a head of keys and values, which are not repeated. A long sequence is
    a loop over blocks of queries, and its backward pass computes the scores of a block again.

    Args:
        q: Queries ``(B, H, L, D)``.
        k: Keys ``(B, G, T, D)``.
        v: Values ``(B, G, T, V)``.
        sinks: Scores ``(H,)`` without values, or ``None``.
        view: Mask of queries and keys.
        options: Scale, window and chunk.
        most: Largest number of scores per head in a block.
    """
    batch, heads, length, depth = q.shape
    grouped = q.reshape(batch, k.shape[1], heads // k.shape[1], length, depth)
    scored = None if sinks is None else sinks.reshape(grouped.shape[1:3])
    blocks = _number_of_blocks(length, k.shape[2], most)
    if blocks == 1:
        mixed = _block(grouped, k, v, scored, view, options)
    else:
        mixed = _looped(grouped, k, v, scored, view, options, blocks)
    return mixed.reshape(batch, heads, length, v.shape[-1])


def _number_of_blocks(length: int, keys: int, most: int) -> int:
    if length * keys <= most:
        return 1
    return -(-length // max(most // keys, 1))


def _block(
    q: Float[Array, "B G R L D"],
    k: Float[Array, "B G T D"],
    v: Float[Array, "B G T V"],
    sinks: Float[Array, "G R"] | None,
    view: View,
    options: Options,
) -> Float[Array, "B G R L V"]:
    """Returns the mixed values of the queries of one block."""
    scores = wide_einsum("bgrqd,bgkd->bgrqk", q, k)
    if options.scale != 1.0:
        scores = scores * options.scale
    bias = view.bias(options.window, options.chunk)
    if bias.shape[1] == 1:
        bias = bias[:, :, None]
    else:
        bias = bias.reshape(bias.shape[0], *q.shape[1:3], *bias.shape[2:])
    weights = softmax(scores + bias, sinks).astype(q.dtype)
    return wide_einsum("bgrqk,bgkd->bgrqd", weights, v).astype(q.dtype)


def softmax(
    scores: Float[Array, "*B L T"], sinks: Float[Array, "*H"] | None
) -> Float[Array, "*B L T"]:
    """Returns the weights ``(..., L, T)`` of keys.

    Args:
        scores: Scores ``(..., L, T)``.
        sinks: Scores of heads that take part in the softmax and have no key, or ``None``.
    """
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    column = jnp.broadcast_to(sinks[..., None, None], (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]


def _looped(
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    view: View,
    options: Options,
    blocks: int,
) -> Array:
    """Returns the mixed values of blocks of queries, one block after the other.

    A block has queries of every shard of the length, so that no device waits for another one.
    """
    length, shards = q.shape[3], axis_size("length")
    shards = 1 if length % shards else shards
    split = functools.partial(_split, blocks=blocks, shards=shards)
    view = view.with_keys()
    assert view.entries is not None  # A view with keys has all vectors.
    queries = (
        split(q, axis=3),
        split(view.segments, axis=1),
        split(view.positions, axis=1),
        split(view.entries, axis=1),
    )

    @jax.checkpoint
    def one(queries, keys):
        q, segments, positions, entries = queries
        k, v, sinks, view = keys
        q = constrain(q, "batch", "heads", None, "length", "head")
        rows = dataclasses.replace(view, segments=segments, positions=positions, entries=entries)
        return _block(q, k, v, sinks, rows, options)

    keys = (k, v, sinks, view)
    mixed = jax.lax.map(lambda queries: one(queries, keys), queries)
    return _joined(mixed, axis=3, length=length, shards=shards)


def _split(x: Array, axis: int, blocks: int, shards: int) -> Array:
    """Returns ``x`` as blocks ``(blocks, ...)``, each with a part of every shard of ``axis``."""
    local = x.shape[axis] // shards
    size = -(-local // blocks)
    x = x.reshape(*x.shape[:axis], shards, local, *x.shape[axis + 1 :])
    padding = [(0, 0)] * x.ndim
    padding[axis + 1] = (0, size * blocks - local)
    x = jnp.pad(x, padding)
    x = x.reshape(*x.shape[: axis + 1], blocks, size, *x.shape[axis + 2 :])
    x = jnp.moveaxis(x, axis + 1, 0)
    return x.reshape(*x.shape[: axis + 1], shards * size, *x.shape[axis + 3 :])


def _joined(x: Array, axis: int, length: int, shards: int) -> Array:
    """Returns the array of which ``x`` has the blocks: the inverse of ``_split``."""
    blocks, size = x.shape[0], x.shape[axis + 1] // shards
    x = x.reshape(*x.shape[: axis + 1], shards, size, *x.shape[axis + 2 :])
    x = jnp.moveaxis(x, 0, axis + 1)
    x = x.reshape(*x.shape[: axis + 1], blocks * size, *x.shape[axis + 3 :])
    x = jax.lax.slice_in_dim(x, 0, length // shards, axis=axis + 1)
    return x.reshape(*x.shape[:axis], length, *x.shape[axis + 2 :])
