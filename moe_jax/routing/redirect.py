"""Several logits per expert: tokens of merged experts go to one network (M-SMoE, 2310.01334)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.errors import ConfigError
from moe_jax.routing.select import TokenChoice


def check_redirect(expert: Sequence[int], num_experts: int) -> None:
    """Rejects a map in which an expert has no logit, or a logit has no expert.

    Args:
        expert: Expert of each of ``V`` logits.
        num_experts: ``E``.

    Raises:
        ConfigError: If so.
    """
    if set(expert) != set(range(num_experts)):
        raise ConfigError(
            f"redirect names the experts {sorted(set(expert))}, and there are {num_experts}: give "
            f"each of the experts 0 to {num_experts - 1} at least one logit"
        )


def redirected(choice: TokenChoice, expert: Sequence[int]) -> TokenChoice:
    """Returns choices among ``E`` experts for choices among ``V`` logits.

    A token that chose several logits of one expert chooses the expert once, with the sum of their
    gates.

    Args:
        choice: Choices ``(S, K)`` among logits.
        expert: Expert of each of ``V`` logits.
    """
    chosen = jnp.asarray(expert, jnp.int32)[choice.expert]
    same = (chosen[:, :, None] == chosen[:, None, :]) & choice.wanted[:, None, :]
    k = chosen.shape[1]
    again = choice.wanted & (same & jnp.tril(jnp.ones((k, k), bool), -1)).any(-1)
    logs = jnp.where(same, choice.log_gate[:, None, :], jnp.finfo(choice.log_gate.dtype).min)
    summed = jnp.where(same, choice.gate[:, None, :], 0).sum(-1)
    first = choice.wanted & ~again
    return TokenChoice(
        expert=chosen,
        gate=jnp.where(first, summed, choice.gate),
        wanted=first,
        queued=choice.queued & ~again,
        log_gate=jnp.where(first, jax.nn.logsumexp(logs, axis=-1), choice.log_gate),
    )


def best_of_logits(scores: Float[Array, "S V"], expert: Sequence[int]) -> Float[Array, "S E"]:
    """Returns the largest score ``(S, E)`` among the logits of each expert."""
    index = jnp.asarray(expert, jnp.int32)
    return jax.ops.segment_max(scores.T, index, num_segments=max(expert) + 1).T


def chosen_logits(choice: TokenChoice, logits: int) -> Float[Array, " V"]:
    """Returns the number ``(V,)`` of tokens that chose each logit."""
    hits = (choice.expert[..., None] == jnp.arange(logits)) & choice.wanted[..., None]
    return hits.sum((0, 1)).astype(jnp.float32)
