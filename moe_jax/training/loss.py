"""Cross-entropy per token, computed in chunks so that the logits of all tokens are never held."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from moe_jax.parallel import over_batch

Array = jax.Array


class VocabularyHead(Protocol):
    """A module that maps hidden states to logits."""

    def logits(self, hidden: Array) -> Array:
        """Returns float32 logits ``(B, L, V)`` for hidden states ``(B, L, M)``."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
    """The scores of a model for every token.

    Attributes:
        nll: Negative log-likelihood ``(B, L)`` of the target, in nats.
        log_z: Log-partition ``(B, L)``.
        correct: Mask ``(B, L)``, True if greedy decoding takes the target: the most likely token,
            and the first one among equally likely tokens.
        distillation: Cross-entropy ``(B, L)`` of the model's distribution against the teacher's,
            in nats; ``None`` without a teacher.
    """

    nll: Array
    log_z: Array
    correct: Array
    distillation: Array | None = None


def score_tokens(head: VocabularyHead, hidden: Array, targets: Array, *, chunk: int) -> TokenScores:
    """Returns the scores of every token.

    Args:
        head: Pytree with the function that returns the logits.
        hidden: Hidden states ``(B, L, M)``.
        targets: Target tokens ``(B, L)`` int32.
        chunk: Number of positions of a device's length that are computed at a time, and recomputed
            in the backward pass; 0 for all. A chunk that does not divide the length counts as 0.
    """
    with jax.named_scope("head"):
        return _chunked(_score, head, hidden, targets, chunk=chunk)


def distil_tokens(
    heads: tuple[VocabularyHead, VocabularyHead],
    hidden: Array,
    targets: Array,
    teacher_hidden: Array,
    *,
    chunk: int,
    temperature: float = 1.0,
) -> TokenScores:
    """Returns the student's scores of every token, against the targets and against the teacher.

    Args:
        heads: Heads of the student and of the teacher.
        hidden: Hidden states ``(B, L, M)`` of the student.
        targets: Target tokens ``(B, L)`` int32.
        teacher_hidden: Hidden states ``(B, L, M')`` of the teacher, which get no gradient.
        chunk: Number of positions as in ``score_tokens``, for the logits of both models.
        temperature: Number ``T`` by which the logits of both models are divided. The cross-entropy
            of these distributions is multiplied by ``T^2``, so that its gradient keeps its size
            (Hinton et al. 2015, 1503.02531, section 2).

    Returns:
        The student's scores including ``distillation`` (temperature 1: Switch, 2101.03961,
        section 4.2).
    """
    with jax.named_scope("head"):
        distil = functools.partial(_distil, temperature)
        return _chunked(distil, heads, hidden, targets, teacher_hidden, chunk=chunk)


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
    temperature: float,
    heads: tuple[VocabularyHead, VocabularyHead],
    hidden: Array,
    targets: Array,
    teacher_hidden: Array,
) -> TokenScores:
    student, teacher = heads
    logits = student.logits(hidden)
    scored = _score_logits(logits, targets)
    taught = jax.lax.stop_gradient(teacher.logits(teacher_hidden))
    if temperature == 1:
        log_z = scored.log_z
    else:
        logits, taught = logits / temperature, taught / temperature
        log_z = jax.nn.logsumexp(logits, axis=-1)
    entropy = log_z - (jax.nn.softmax(taught, axis=-1) * logits).sum(-1)
    return dataclasses.replace(scored, distillation=temperature**2 * entropy)


def _score(head: VocabularyHead, hidden: Array, targets: Array) -> TokenScores:
    return _score_logits(head.logits(hidden), targets)


def _score_logits(logits: Array, targets: Array) -> TokenScores:
    # A masked sum replaces a gather: it fuses, and its transpose is not a scatter.
    chosen = targets[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)
    target = jnp.where(chosen, logits, 0.0).sum(-1)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return TokenScores(log_z - target, log_z, _greedy(jax.lax.stop_gradient(logits)) == targets)


def _greedy(logits: Array) -> Array:
    """Returns ``argmax`` over the last axis, int32.

    XLA splits these two reductions over devices; before an ``argmax`` it gathers a split axis.
    """
    size = logits.shape[-1]
    best = logits == logits.max(-1, keepdims=True)
    return jnp.where(best, jnp.arange(size, dtype=jnp.int32), size).min(-1)
