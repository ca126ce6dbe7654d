"""Copies of experts and their devices: published numbers, properties, and equal outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax import routing, serving
from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, DecoderConfig
from moe_jax.nn.mode import DECODE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel import MeshConfig, make_mesh, shardings_of_state
from moe_jax.serving.placement import copied, packed

E, VOCAB, SHAPE = 8, 32, (16, 8)
TOKENS = jax.random.randint(jax.random.key(1), SHAPE, 1, VOCAB)
ONES, PLACES = jnp.ones(SHAPE, jnp.int32), jnp.tile(jnp.arange(SHAPE[1]), (SHAPE[0], 1))


def test_the_example_of_eplb():
    # README of deepseek-ai/EPLB: two layers of 12 experts, 16 places on 2 nodes of 4 devices.
    loads = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    wanted = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    found = [serving.place(load, 16, 8, groups=4, nodes=2).tolist() for load in loads]
    assert found == wanted


def test_packs_and_copies_by_hand():
    # 7 and 2 in one pack, 5 and 4 in the other: each item goes to the lighter pack with room.
    assert packed(np.array([2.0, 7.0, 5.0, 4.0]), 2).tolist() == [[1, 0], [2, 3]]
    # 9 is the largest load; then 4.5 is.
    assert copied(np.array([1.0, 9.0, 4.0]), 5).tolist() == [0, 1, 2, 1, 1]


@given(
    st.lists(st.integers(0, 1000), min_size=8, max_size=8),
    st.sampled_from([8, 12, 16]),
    st.sampled_from([(1, 1), (2, 2), (4, 2)]),
)
def test_every_expert_has_a_place_and_devices_have_equally_many(load, places, grouping):
    groups, nodes = grouping
    expert = serving.place(load, places, 4, groups=groups, nodes=nodes)
    assert len(expert) == places and set(expert.tolist()) == set(range(8))
    if nodes > 1:  # experts of a group stay on one node
        node = np.repeat(np.arange(nodes), places // nodes)
        group = expert // (8 // groups)
        assert all(len(set(node[group == g].tolist())) == 1 for g in range(groups))
    loads = serving.device_loads(load, expert, 4)
    assert loads.sum() == pytest.approx(sum(load))
    # The rule of packs: no device is above the mean by more than the largest copy.
    share = np.asarray(load) / np.bincount(expert, minlength=8)
    if nodes == 1:
        assert loads.max() <= sum(load) / 4 + share.max() + 1e-6


@pytest.mark.parametrize(
    ("numbers", "match"),
    [
        ((6, 2, {}), "8 experts need at least 8 places, found 6"),
        ((9, 2, {}), "9 places do not divide into 2 devices"),
        ((8, 2, {"groups": 3}), "8 experts do not divide into 3 groups"),
        ((8, 3, {"groups": 2, "nodes": 2}), "8 places do not divide into 3 devices"),
    ],
)
def test_numbers_that_do_not_divide_are_refused(numbers, match):
    places, devices, options = numbers
    with pytest.raises(ConfigError, match=match):
        serving.place([1.0] * 8, places, devices, **options)


def decoder(transport="gather", exchange="gspmd", router="mixtral", **settings) -> Decoder:
    moe = MoEConfig(
        every=2,
        num_experts=E,
        expert_dim=8,
        group_size=8,
        router=routing.preset(router),
        transport=transport,
        exchange=exchange,
        **settings,
    )
    config = DecoderConfig(num_layers=4, width=8, num_heads=2, head_dim=4, mlp_dim=12, moe=moe)
    return Decoder(config, VOCAB, jax.random.key(0))


def hidden(model: Decoder):
    return model.hidden(TOKENS, ONES, PLACES, mode=DECODE)


def zipf(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(1.0 / np.arange(1, E + 1))


@pytest.mark.parametrize("transport", ["einsum", "gather", "ragged"])
def test_outputs_stay_equal_and_other_places_need_no_compilation(transport):
    model, compiled = decoder(transport), jax.jit(lambda m: hidden(m)[0])
    wanted = compiled(model)
    for seed in range(3):
        serving.copy_experts(model, [serving.place(zipf(seed + i), 12, 4) for i in range(2)])
        np.testing.assert_allclose(compiled(model), wanted, rtol=1e-5, atol=1e-6)
    assert compiled._cache_size() == 2  # without copies and with copies
    up = model.layers.parts[0][1].feed_forward.experts.up
    assert up.shape == (2, 12, 8, 8)


@pytest.mark.parametrize(
    ("transport", "exchange"),
    [("gather", "gspmd"), ("einsum", "all_to_all"), ("gather", "ring"), ("ragged", "ragged")],
)
def test_eight_devices_have_the_outputs_of_one(transport, exchange):
    wanted, reports = jax.jit(hidden)(decoder())[:2]
    loads = [np.asarray(load) for report in reports for load in report.counts.load.reshape(-1, E)]
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    model = decoder(transport, exchange)
    model = jax.device_put(model, shardings_of_state(model, mesh))
    serving.copy_experts(model, [serving.place(load, 12, 4) for load in loads])
    with jax.set_mesh(mesh):
        found = jax.jit(hidden)(model)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    up = model.layers.parts[0][1].feed_forward.experts.up[...]
    assert up.sharding.shard_shape(up.shape) == (2, 3, 8, 8)


def test_copies_even_out_zipf_traffic():
    # 64 experts on 8 devices with Zipf loads, in order: the first device has 8 of the largest.
    load = 1.0 / np.arange(1, 65)
    before = serving.device_loads(load, np.arange(64), 8)
    after = serving.device_loads(load, serving.place(load, 80, 8), 8)
    assert before.max() / before.mean() > 4.5
    assert after.max() / after.mean() < 1.02


def test_models_that_cannot_have_copies_are_refused():
    places = [serving.place(zipf(0), 12, 4)] * 2
    with pytest.raises(ConfigError, match="the model has 2 MoE layers and the experts of 1"):
        serving.copy_experts(decoder(), places[:1])
    with pytest.raises(ConfigError, match="copies of experts need tokens that choose experts"):
        serving.copy_experts(decoder(router="expert_choice", allow_future_leak=True), places)
    with pytest.raises(ConfigError, match="several widths"):
        serving.copy_experts(decoder(expert_dims=(8, 4)), places)
    with pytest.raises(ConfigError, match="equal layers are stacked and need equally many"):
        serving.copy_experts(decoder(), [places[0], np.arange(8)])
