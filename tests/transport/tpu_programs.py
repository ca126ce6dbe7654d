"""Compiles a dropless layer for four chips of a TPU and prints its collectives as JSON.

``test_ragged_exchange.py`` runs this file in a process of its own, without simulated devices.
"""

import json
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.mode import TRAIN
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel import MeshConfig, make_mesh, shardings_of_state
from moe_jax.planning import topology
from moe_jax.routing import presets

GROUPS, SIZE, WIDTH, HIDDEN, EXPERTS = 8, 256, 256, 128, 8
KINDS = ("ragged-all-to-all", "all-to-all", "collective-permute", "reduce-scatter")


def layer() -> ConfiguredMoE:
    """Returns a dropless layer whose transport is selected for the mesh."""
    config = MoEConfig(
        num_experts=EXPERTS,
        expert_dim=HIDDEN,
        group_size=SIZE,
        router=presets.mixtral(),
        transport="auto",
    )
    return ConfiguredMoE(
        config, FeedForwardConfig(WIDTH, HIDDEN, "silu", gated=True), jax.random.key(0)
    )


def objective(moe: ConfiguredMoE, x: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns a value that depends on all outputs and losses."""
    y, aux = moe(x, valid, mode=TRAIN)
    return jnp.square(y.astype(jnp.float32)).sum() + aux.loss


def counts(function, *arguments) -> dict[str, int]:
    """Returns the number of collectives of a compiled function, and of its kernels."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    found = {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in KINDS}
    return found | {"kernels": len(re.findall('custom_call_target="tpu_custom_call"', text))}


def main() -> None:
    """Prints the collectives of the forward pass, and of the forward and the backward pass."""
    mesh = make_mesh(MeshConfig(data=1, expert=4), topology.parse("v5p:2x2x1").devices())
    moe = jax.eval_shape(layer)
    moe = jax.tree.map(
        lambda one, where: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=where),
        moe,
        shardings_of_state(moe, mesh),
    )
    groups = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))
    x = jax.ShapeDtypeStruct((GROUPS, SIZE, WIDTH), jnp.bfloat16, sharding=groups)
    valid = jax.ShapeDtypeStruct((GROUPS, SIZE), bool, sharding=groups)
    with jax.set_mesh(mesh):
        forward = counts(objective, moe, x, valid)
        backward = counts(jax.grad(objective, (0, 1)), moe, x, valid)
    print(json.dumps({"forward": forward, "backward": backward}))


if __name__ == "__main__":
    main()
