"""Groups of tokens: a batch of sequences is cut into groups, which are routed independently."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from moe_jax.parallel import constrain, group_shards


def num_groups(total: int, group_size: int) -> tuple[int, int]:
    """Returns ``G`` and ``S`` for ``total`` tokens; every device has the same number of groups."""
    size = min(group_size, total)
    groups = -(-total // size)
    return -(-groups // group_shards()) * group_shards(), size


def into_groups(
    x: Shaped[Array, "B L *features"], group_size: int, fill: int | bool = 0
) -> Shaped[Array, "G S *features"]:
    """Returns the tokens ``(B, L, ...)`` as groups ``(G, S, ...)``, padded with ``fill``."""
    total = x.shape[0] * x.shape[1]
    groups, size = num_groups(total, group_size)
    flat = x.reshape(total, *x.shape[2:])
    padding = ((0, groups * size - total), *((0, 0),) * (flat.ndim - 1))
    flat = jnp.pad(flat, padding, constant_values=fill)
    return flat.reshape(groups, size, *x.shape[2:])


def tokens_into_groups(x: Float[Array, "B L M"], group_size: int) -> Float[Array, "G S M"]:
    """Returns the tokens ``(B, L, M)`` as groups ``(G, S, M)``, each group on its own device."""
    total, width = x.shape[0] * x.shape[1], x.shape[-1]
    groups, size = num_groups(total, group_size)
    tokens = jnp.pad(x.reshape(total, width), ((0, groups * size - total), (0, 0)))
    return constrain(tokens.reshape(groups, size, width), "group")


def out_of_groups(y: Shaped[Array, "G S N"], shape: tuple[int, ...]) -> Shaped[Array, "B L N"]:
    """Returns groups ``(G, S, N)`` as sequences ``(B, L, N)``: the inverse of ``into_groups``.

    Args:
        y: Features of the tokens in groups.
        shape: Shape ``(B, L, ...)`` of the batch.
    """
    batch, length = shape[:2]
    return y.reshape(-1, y.shape[-1])[: batch * length].reshape(batch, length, -1)
