import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import routing
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.mode import TRAIN
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel import (
    ALL_TO_ALL,
    GSPMD,
    MeshConfig,
    group_shards,
    make_mesh,
    over_groups,
    shardings_of_state,
)

# data, expert, model, fsdp and sequence.
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8), (2, 2, 2), (1, 2, 2, 2), (1, 2, 1, 2, 2), (1, 4, 1, 1, 2)]
MESHES += [(1, 2, 4)]  # two shards of the groups
GROUPS = PartitionSpec(("data", "fsdp", "expert", "sequence"))
EXCHANGES = {"gspmd": GSPMD, "all_to_all": ALL_TO_ALL}


@pytest.mark.parametrize("exchange", EXCHANGES.values(), ids=EXCHANGES)
@pytest.mark.parametrize("sizes", [None, *MESHES], ids=str)
def test_the_exchange_moves_slots_to_their_experts_and_back(sizes, exchange):
    # 16 groups, two per device on the larger meshes, so that the order within a device shows.
    x = np.arange(16 * 8 * 3 * 2, dtype=np.float32).reshape(16, 8, 3, 2)
    mesh = make_mesh(MeshConfig(*sizes)) if sizes else jax.sharding.AbstractMesh((), ())

    def both(x):
        there = exchange.to_experts(x)
        return there, exchange.to_groups(there, 16)

    with jax.set_mesh(mesh) if sizes else jax.sharding.use_abstract_mesh(mesh):
        there, back = jax.jit(both)(x)
    # An expert's slots come in any order.
    expected = np.sort(x.swapaxes(0, 1).reshape(8, 48, 2), axis=1)
    np.testing.assert_array_equal(np.sort(np.asarray(there), axis=1), expected)
    np.testing.assert_array_equal(back, x)
    if sizes:
        assert there.sharding.shard_shape(there.shape)[0] == 8 // sizes[1]
        model = sizes[2] if len(sizes) > 2 else 1
        assert back.sharding.shard_shape(back.shape)[0] == 16 // (8 // model)


def test_group_shards():
    assert group_shards() == 1
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        assert group_shards() == 4


def test_over_groups_runs_on_each_devices_groups():
    x, keys = jnp.arange(16.0).reshape(8, 2), None
    seen = []

    def function(x, keys):
        seen.append((x.shape, keys))
        return {"double": 2 * x}

    with jax.set_mesh(make_mesh(MeshConfig(4, 2))):
        out = jax.jit(lambda x: over_groups(function)(x, keys))(x)
    assert seen == [((1, 2), None)]
    np.testing.assert_array_equal(out["double"], 2 * x)
    assert over_groups(function) is function


def collectives(compiled) -> dict[str, int]:
    names = ("all-to-all", "all-gather", "collective-permute", "reduce-scatter")
    text = compiled.as_text()
    return {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in names}


@pytest.mark.parametrize(
    ("sizes", "name", "transport", "exchange"),
    [
        ((4, 2), "gshard", "gather", "gspmd"),
        ((4, 2), "switch", "einsum", "gspmd"),
        ((2, 4), "gshard", "einsum", "gspmd"),
        ((2, 4), "expert_choice", "gather", "gspmd"),
        ((4, 2), "gshard", "gather", "all_to_all"),
        ((2, 4), "switch", "einsum", "all_to_all"),
    ],
    ids=str,
)
def test_the_layer_has_two_all_to_alls_and_four_with_its_gradient(sizes, name, transport, exchange):
    # Meshes with both axes: on (1, 8) every form looks alike and a count proves nothing.
    # Jitter, random second expert and expert dropout included; all-reduces are losses, counts and
    # the gradients of replicated parameters.
    mesh = make_mesh(MeshConfig(*sizes))
    config = MoEConfig(
        num_experts=8,
        expert_dim=32,
        group_size=32,
        router=dataclasses.replace(routing.preset(name), input_jitter=0.1),
        transport=transport,
        exchange=exchange,
        expert_dropout=0.1,
    )
    moe = ConfiguredMoE(config, FeedForwardConfig(16, 32), jax.random.key(0))
    moe = jax.device_put(moe, shardings_of_state(moe, mesh))
    x = jax.device_put(jnp.ones((32, 16, 16)), NamedSharding(mesh, GROUPS))
    valid = jax.device_put(jnp.ones((32, 16), bool), NamedSharding(mesh, GROUPS))

    def forward(moe, x, valid, key):
        return moe(x, valid, mode=TRAIN, rng=key)

    def objective(*args):
        y, aux = forward(*args)
        return jnp.square(y).sum() + aux.loss

    none = {"all-gather": 0, "collective-permute": 0, "reduce-scatter": 0}
    with jax.set_mesh(mesh):
        args = (moe, x, valid, jax.random.key(1))
        compiled = jax.jit(forward).lower(*args).compile()
        assert collectives(compiled) == {"all-to-all": 2, **none}
        compiled = jax.jit(jax.grad(objective, argnums=(0, 1))).lower(*args).compile()
        assert collectives(compiled) == {"all-to-all": 4, **none}


def test_choices_are_sent_twice_and_four_times_with_the_gradient():
    # On CPUs, all-to-alls send padded parts in place of unequal parts. One all-gather collects the
    # numbers of rows.
    mesh = make_mesh(MeshConfig(4, 2))
    config = MoEConfig(
        num_experts=8,
        expert_dim=32,
        group_size=32,
        router=routing.preset("mixtral"),
        transport="ragged",
        exchange="ragged",
    )
    moe = ConfiguredMoE(config, FeedForwardConfig(16, 32), jax.random.key(0))
    moe = jax.device_put(moe, shardings_of_state(moe, mesh))
    x = jax.device_put(jnp.ones((32, 16, 16)), NamedSharding(mesh, GROUPS))
    valid = jax.device_put(jnp.ones((32, 16), bool), NamedSharding(mesh, GROUPS))

    def objective(moe, x):
        y, aux = moe(x, valid, mode=TRAIN)
        return jnp.square(y).sum() + aux.loss

    others = {"all-gather": 1, "collective-permute": 0, "reduce-scatter": 0}
    with jax.set_mesh(mesh):
        compiled = jax.jit(objective).lower(moe, x).compile()
        assert collectives(compiled) == {"all-to-all": 2, **others}
        compiled = jax.jit(jax.grad(objective, argnums=(0, 1))).lower(moe, x).compile()
        assert collectives(compiled) == {"all-to-all": 4, **others}
