"""The device mesh: only this package knows the names of the mesh axes."""

from moe_jax.parallel.exchange import (
    ALL_TO_ALL,
    GSPMD,
    Exchange,
    around_the_ring,
    group_shards,
    on_each_device,
    on_expert_devices,
    over_batch,
    over_groups,
    over_heads,
)
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.parallel.ragged import exchange_rows
from moe_jax.parallel.rules import (
    axis_size,
    constrain,
    constrain_parameters,
    left_to_xla,
    platform,
    sharding_of,
    shardings_of_state,
)

__all__ = [
    "ALL_TO_ALL",
    "GSPMD",
    "Exchange",
    "MeshConfig",
    "around_the_ring",
    "axis_size",
    "constrain",
    "constrain_parameters",
    "exchange_rows",
    "group_shards",
    "left_to_xla",
    "make_mesh",
    "on_each_device",
    "on_expert_devices",
    "over_batch",
    "over_groups",
    "over_heads",
    "platform",
    "sharding_of",
    "shardings_of_state",
]
