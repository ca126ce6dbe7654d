"""Cross-entropy per token, in pieces that never hold all logits."""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

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
        correct: ``(B, L)`` bool, no other token was likelier.
    """

    nll: Array
    log_z: Array
    correct: Array


def score_tokens(head: Head, hidden: Array, targets: Array, *, chunk: int) -> Scored:
    """Scores every token.

    Args:
        head: a pytree that gives the logits.
        hidden: ``(B, L, M)``.
        targets: ``(B, L)`` int32.
        chunk: positions of a device's length computed at a time, and recomputed in the backward
            pass; 0 for all at once. A chunk that does not divide the length counts as 0.
    """
    if chunk == 0:
        return _score(head, hidden, targets)
    return over_batch(functools.partial(_in_chunks, chunk=chunk), head, hidden, targets)


def _in_chunks(head: Head, hidden: Array, targets: Array, *, chunk: int) -> Scored:
    batch, length, width = hidden.shape
    if length % chunk:
        return _score(head, hidden, targets)
    parts = length // chunk
    hidden = hidden.reshape(batch, parts, chunk, width).swapaxes(0, 1)
    targets = targets.reshape(batch, parts, chunk).swapaxes(0, 1)
    one = jax.checkpoint(lambda step: _score(head, *step))
    scored = jax.lax.map(one, (hidden, targets))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, length), scored)


def _score(head: Head, hidden: Array, targets: Array) -> Scored:
    logits = head.logits(hidden)
    # A masked sum instead of a gather: it fuses, and its transpose is no scatter.
    chosen = targets[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)
    target = jnp.where(chosen, logits, 0.0).sum(-1)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return Scored(log_z - target, log_z, target >= jax.lax.stop_gradient(logits).max(-1))
