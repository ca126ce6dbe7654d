"""Cross-entropy per token, in pieces that never hold all logits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from moe_jax.parallel import over_batch

Array = jax.Array


class Head(Protocol):
    """What turns hidden states into logits."""

    def logits(self, hidden: Array) -> Array:
        """Maps ``(B, L, M)`` to float32 ``(B, L, V)``."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scored:
    """How a model did on every token.

    Attributes:
        nll: ``(B, L)`` negative log-likelihood of the target, nats.
        log_z: ``(B, L)`` log-partition.
        correct: ``(B, L)`` bool, greedy decoding takes the target: the likeliest token, and of
            equally likely ones the first.
        distillation: ``(B, L)`` cross-entropy of the model's distribution against a teacher's,
            nats; ``None`` without a teacher.
    """

    nll: Array
    log_z: Array
    correct: Array
    distillation: Array | None = None


def score_tokens(head: Head, hidden: Array, targets: Array, *, chunk: int) -> Scored:
    """Scores every token.

    Args:
        head: a pytree that gives the logits.
        hidden: ``(B, L, M)``.
        targets: ``(B, L)`` int32.
        chunk: positions of a device's length computed at a time, and recomputed in the backward
            pass; 0 for all at once. A chunk that does not divide the length counts as 0.
    """
    return _chunked(_score, head, hidden, targets, chunk=chunk)


def distil_tokens(
    heads: tuple[Head, Head], hidden: Array, targets: Array, teacher_hidden: Array, *, chunk: int
) -> Scored:
    """Scores every token, and the student against the teacher's distribution of it.

    Args:
        heads: of student and teacher.
        hidden: ``(B, L, M)`` of the student.
        targets: ``(B, L)`` int32.
        teacher_hidden: ``(B, L, M')`` of the teacher; nothing is differentiated by it.
        chunk: as in ``score_tokens``; logits of both models are held for as many positions.

    Returns:
        The student's scores, ``distillation`` among them, at temperature 1 (Switch, 2101.03961,
        section 4.2).
    """
    return _chunked(_distil, heads, hidden, targets, teacher_hidden, chunk=chunk)


def _chunked(score: Callable[..., Any], module: Any, *arrays: Array, chunk: int) -> Any:
    if chunk == 0:
        return score(module, *arrays)
    return over_batch(functools.partial(_in_chunks, score, chunk), module, *arrays)


def _in_chunks(score: Callable[..., Any], chunk: int, module: Any, *arrays: Array) -> Any:
    batch, length = arrays[0].shape[:2]
    if length % chunk:
        return score(module, *arrays)
    parts = length // chunk
    cut = tuple(x.reshape(batch, parts, chunk, *x.shape[2:]).swapaxes(0, 1) for x in arrays)
    one = jax.checkpoint(lambda step: score(module, *step))
    scored = jax.lax.map(one, cut)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, length), scored)


def _distil(
    heads: tuple[Head, Head], hidden: Array, targets: Array, teacher_hidden: Array
) -> Scored:
    student, teacher = heads
    logits = student.logits(hidden)
    scored = _score_logits(logits, targets)
    wanted = jax.nn.softmax(jax.lax.stop_gradient(teacher.logits(teacher_hidden)), axis=-1)
    return dataclasses.replace(scored, distillation=scored.log_z - (wanted * logits).sum(-1))


def _score(head: Head, hidden: Array, targets: Array) -> Scored:
    return _score_logits(head.logits(hidden), targets)


def _score_logits(logits: Array, targets: Array) -> Scored:
    # A masked sum instead of a gather: it fuses, and its transpose is no scatter.
    chosen = targets[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)
    target = jnp.where(chosen, logits, 0.0).sum(-1)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return Scored(log_z - target, log_z, _greedy(jax.lax.stop_gradient(logits)) == targets)


def _greedy(logits: Array) -> Array:
    """Returns ``argmax`` over the last axis, int32.

    Two reductions that XLA splits over devices; it gathers a split axis before an ``argmax``.
    """
    size = logits.shape[-1]
    best = logits == logits.max(-1, keepdims=True)
    return jnp.where(best, jnp.arange(size, dtype=jnp.int32), size).min(-1)
