"""The device mesh: the only place that knows the names of its axes."""

from moe_jax.parallel.exchange import (
    experts_to_groups,
    group_shards,
    groups_to_experts,
    over_groups,
)
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.parallel.rules import constrain, constrain_parameters, sharding_of, shardings_of_state

__all__ = [
    "MeshConfig",
    "constrain",
    "constrain_parameters",
    "experts_to_groups",
    "group_shards",
    "groups_to_experts",
    "make_mesh",
    "over_groups",
    "sharding_of",
    "shardings_of_state",
]
