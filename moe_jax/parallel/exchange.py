"""Between group-sharded and expert-sharded slots: one all-to-all each way.

XLA emits exactly one all-to-all for this form: split the group and expert axes into (shard, rest),
swap the two shard axes, and pin the expert mesh axis to the first before the swap and to the second
after it. Constraining less, such as the expert axis alone, adds all-gathers of the slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.parallel.rules import constrain, spec

Array = jax.Array


def _axis_sizes() -> tuple[int, int]:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1, 1
    return mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["expert"]


def group_shards() -> int:
    """Returns over how many shards the groups are split on the mesh in force."""
    data, expert = _axis_sizes()
    return data * expert


def over_groups(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs ``function`` on each device's groups alone: its arrays all start with ``G``.

    For what treats every group by itself, such as routing. XLA cannot split ``top_k`` over a batch
    axis and would gather the scores of all groups on every device.
    """
    if group_shards() == 1:
        return function
    # Loops inside start from constants, which the check would want marked as differing by device.
    return jax.shard_map(function, in_specs=spec("group"), out_specs=spec("group"), check_vma=False)


def groups_to_experts(x: Array) -> Array:
    """Moves slots to the devices of their experts: ``(G, E, C, M)`` to ``(E, G * C, M)``."""
    groups, experts, capacity, width = x.shape
    data, shards = _axis_sizes()
    if data * shards == 1:
        return x.swapaxes(0, 1).reshape(experts, groups * capacity, width)
    x = x.reshape(data, shards, -1, shards, experts // shards, capacity, width)
    x = constrain(x, "data", "expert")
    x = constrain(jnp.swapaxes(x, 1, 3), "data", "expert")
    x = x.transpose(1, 4, 0, 3, 2, 5, 6).reshape(experts, groups * capacity, width)
    return constrain(x, "expert", "data")


def experts_to_groups(y: Array, groups: int) -> Array:
    """Moves slots back to the devices of their groups: ``(E, G * C, M)`` to ``(G, E, C, M)``."""
    experts, slots, width = y.shape
    capacity = slots // groups
    data, shards = _axis_sizes()
    if data * shards == 1:
        return y.reshape(experts, groups, capacity, width).swapaxes(0, 1)
    y = constrain(y, "expert", "data")
    y = y.reshape(shards, experts // shards, data, shards, -1, capacity, width)
    y = constrain(y.transpose(2, 0, 4, 3, 1, 5, 6), "data", "expert")
    y = constrain(jnp.swapaxes(y, 1, 3), "data", "expert")
    return constrain(y.reshape(groups, experts, capacity, width), "group")
