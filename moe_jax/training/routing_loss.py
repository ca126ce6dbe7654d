"""Divergence between the routing distributions of a teacher and of its student."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from moe_jax.config.routing_groups import RoutingGroups

_TINY = float(np.finfo(np.float32).tiny)


def grouped(log_shares: Float[Array, "*B T"], group: Sequence[int]) -> Float[Array, "*B V"]:
    """Returns the shares ``(..., V)`` of groups of experts, which sum to 1.

    Args:
        log_shares: Logarithm ``(..., T)`` of the share of each expert of the teacher.
        group: Group of each expert, from 0; -1 leaves its share out. Empty for one group per
            expert.
    """
    shares = jnp.exp(log_shares)
    if not group:
        return shares
    member = np.asarray(group)[:, None] == np.arange(max(group) + 1)
    summed = jnp.einsum("...t,tv->...v", shares, jnp.asarray(member, shares.dtype))
    return summed / jnp.maximum(summed.sum(-1, keepdims=True), _TINY)


def divergence(
    log_shares: Float[Array, "*B V"], wanted: Float[Array, "*B V"]
) -> Float[Array, "*B"]:
    """Returns the Kullback-Leibler divergence of a student's shares from wanted ones, in nats."""
    logs = jnp.where(wanted > 0, jnp.log(jnp.maximum(wanted, _TINY)) - log_shares, 0)
    return (wanted * logs).sum(-1)


def routing_loss(
    student: Sequence[Float[Array, "B L V"]],
    teacher: Sequence[Float[Array, "B L T"]],
    groups: RoutingGroups,
    valid: Sequence[Bool[Array, "B L"]],
    tokens: Sequence[Float[Array, ""]],
) -> Float[Array, ""]:
    """Returns the divergence per token in nats, as a mean over MoE layers.

    Args:
        student: Logarithms of the shares of the student's experts, by MoE layer.
        teacher: The same of the teacher; they get no gradient.
        groups: Group of each expert of the teacher, by MoE layer; see ``grouped``.
        valid: Mask, False for padding, by MoE layer.
        tokens: Number of tokens of the whole batch, by MoE layer. The losses of the parts of a
            batch then add up.
    """
    total = jnp.float32(0)
    for layer, (log_shares, theirs) in enumerate(zip(student, teacher, strict=True)):
        wanted = grouped(jax.lax.stop_gradient(theirs), groups[layer] if groups else ())
        lost = jnp.where(valid[layer], divergence(log_shares, wanted), 0).sum()
        total += lost / jnp.maximum(tokens[layer], 1)
    return total / max(len(student), 1)
