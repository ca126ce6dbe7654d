"""A layer on a mesh computes what it computes on one device, whatever its router does inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import routing
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.mode import TRAIN
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.shared import SharedConfig
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.training.state import split_model
from tests.matrix import sample

WIDTH, E, GROUPS, S = 6, 8, 8, 16
EXPERT = FeedForwardConfig(WIDTH, 8, activation="silu")
# Loops, sorts, lookups, state and mixtures: what XLA could split in the wrong way.
ROUTERS = {
    "base": {},
    "sinkhorn": {"capacity_factor": 1.0},
    "hash": {"kind": "balanced", "vocab_size": 64},
    "expert_choice_capped": {"experts_per_token": 3},
    "soft_moe": {"slots_per_expert": 2},
    "vmoe": {"capacity_factor": 0.5},
    "noisy_top_k": {"k": 2},
    "deepseek_v2": {"k": 2, "devices": 4, "keep_devices": 2},
    "deepseek_v3": {"k": 2, "groups": 4, "keep_groups": 2},
    "no_token_left_behind": {"capacity_factor": 0.75},
    "llama4": {},
    "hierarchical": {"k_groups": 2, "k": 1},
    "moe_plus_plus": {"capacity_factor": 0.75},
    "quantile_balancing": {"k": 2},
    "remoe": {"k": 2, "l1_weight": 0.1, "growth": 1.5},
    "expert_threshold": {"k": 2, "decay": 0.5},
}


def measured(config, mesh):
    """Gradients, output, report and the router's next state in two steps of training.

    Only the state of the router changes between the steps; it is zeros before the first one.
    """
    x = jax.random.normal(jax.random.key(1), (GROUPS, S, WIDTH))
    valid = jnp.arange(GROUPS * S).reshape(GROUPS, S) % 7 > 0
    ids = jax.random.randint(jax.random.key(2), (GROUPS, S), 0, 64)

    def objective(layer, x):
        y, aux = layer(x, valid, mode=TRAIN, rng=jax.random.key(3), token_ids=ids)
        return jnp.sin(y).sum() + aux.loss, (y, aux)

    def whole():
        graph, params, state = split_model(ConfiguredMoE(config, EXPERT, jax.random.key(0)))

        def step(state, _):
            found = jax.grad(objective, (0, 1), has_aux=True, allow_int=True)(
                nnx.merge(graph, params, state), x
            )
            # A merged module shares its variables with the state; the copy keeps the old state.
            layer = nnx.merge(graph, params, jax.tree.map(lambda leaf: leaf, state))
            layer.router.update(found[1][1].counts)
            after = split_model(layer)[2]
            return after, (found, after)

        return jax.lax.scan(step, state, length=2)[1]

    with jax.set_mesh(mesh):
        return jax.jit(whole)()


@pytest.mark.parametrize("name", sample(list(ROUTERS), 2))
def test_values_gradients_and_next_state_on_four_by_two_devices_are_those_of_one(name):
    router = routing.preset(name, **ROUTERS[name])
    transport = "gather" if router.select.slot_table else "einsum"
    config = MoEConfig(
        num_experts=E,
        expert_dim=EXPERT.hidden,
        group_size=S,
        router=router,
        transport=transport,
        shared=SharedConfig(4, "sigmoid"),
    )
    single = measured(config, make_mesh(MeshConfig(1), jax.devices()[:1]))
    sharded = measured(config, make_mesh(MeshConfig(2, 4)))
    for state in jax.tree.leaves(single[1]):
        assert np.any(state[0]) and np.any(state[1] != state[0]), "each step moves the state"
    paths = jax.tree_util.tree_leaves_with_path(single)
    for (path, wanted), got in zip(paths, jax.tree.leaves(sharded), strict=True):
        wanted = np.asarray(wanted)
        if wanted.dtype == jax.dtypes.float0:
            continue
        size = np.abs(wanted).max(initial=1e-6)
        message = jax.tree_util.keystr(path)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * size, err_msg=message)
