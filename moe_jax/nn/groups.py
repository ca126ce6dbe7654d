"""Between a batch of sequences and the groups that are routed one by one."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_jax.parallel import constrain, group_shards

Array = jax.Array


def num_groups(total: int, group_size: int) -> tuple[int, int]:
    """Returns ``G`` and ``S`` for ``total`` tokens: every device has as many groups."""
    size = min(group_size, total)
    groups = -(-total // size)
    return -(-groups // group_shards()) * group_shards(), size


def into_groups(x: Array, group_size: int, fill: int | bool = 0) -> Array:
    """Cuts ``(B, L, ...)`` into groups ``(G, S, ...)``, padded with ``fill``."""
    total = x.shape[0] * x.shape[1]
    groups, size = num_groups(total, group_size)
    flat = x.reshape(total, *x.shape[2:])
    padding = ((0, groups * size - total), *((0, 0),) * (flat.ndim - 1))
    flat = jnp.pad(flat, padding, constant_values=fill)
    return flat.reshape(groups, size, *x.shape[2:])


def tokens_into_groups(x: Array, group_size: int) -> Array:
    """Cuts ``(B, L, M)`` into groups ``(G, S, M)`` on the devices of the groups."""
    total, width = x.shape[0] * x.shape[1], x.shape[-1]
    groups, size = num_groups(total, group_size)
    tokens = jnp.pad(x.reshape(total, width), ((0, groups * size - total), (0, 0)))
    return constrain(tokens.reshape(groups, size, width), "group")


def out_of_groups(y: Array, shape: tuple[int, ...]) -> Array:
    """Undoes ``into_groups``: ``(G, S, M)`` to ``(B, L, M)`` for ``shape = (B, L, ...)``."""
    batch, length = shape[:2]
    return y.reshape(-1, y.shape[-1])[: batch * length].reshape(batch, length, -1)
