"""What routers carry between steps moves once per optimizer step, from that step's counts."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.config.optimizer import OptimizerConfig
from moe_jax.models import DecoderConfig
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.routing import Capacity, LoadBalance
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import Recipe, named_leaves
from moe_jax.training.step import Objective, train_step

VOCAB, ROWS, LENGTH, E, RATE = 32, 8, 16, 4, 0.25
BIASED = routing.preset("loss_free", k=2, bias_rate=RATE)
AVERAGED = dataclasses.replace(routing.preset("mixtral"), balance=(LoadBalance(1e-2, ema=0.75),))


QUANTILE = routing.preset("quantile_balancing", k=2)


@pytest.fixture(autouse=True, scope="module")
def fast_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


ONE = MeshConfig(1)


def recipe(router, mesh=ONE, remat="none", scan=True):
    moe = MoEConfig(every=1, num_experts=E, expert_dim=8, group_size=LENGTH, router=router)
    config = DecoderConfig(
        num_layers=2,
        width=8,
        num_heads=2,
        head_dim=4,
        mlp_dim=16,
        scan_layers=scan,
        remat=remat,
        moe=moe,
    )
    devices = jax.devices()[: mesh.data * mesh.expert * mesh.model]
    optimizer = make_optimizer(OptimizerConfig(), 10)
    return Recipe(config, VOCAB, optimizer, 0, make_mesh(mesh, devices))


def batch(seed=0):
    rng = np.random.default_rng(seed)
    arrays = {name: rng.integers(0, VOCAB, (ROWS, LENGTH)) for name in ("inputs", "targets")}
    arrays["segments"] = np.ones((ROWS, LENGTH)) * (np.arange(LENGTH) < 11)
    arrays["positions"] = np.tile(np.arange(LENGTH), (ROWS, 1))
    return {name: array.astype(np.int32) for name, array in arrays.items()}


@functools.cache
def alone():
    """States and reports of the biased router on one device."""
    return run(recipe(BIASED))


def run(made, steps=1, microbatches=1, poison=()):
    """States and reports of so many steps, the first state first; poisoned steps are not finite."""
    graph, state = made.create()
    objective = Objective(microbatches)
    step = jax.jit(functools.partial(train_step, graph, made.optimizer, objective))
    states, reports = [state], []
    with jax.set_mesh(made.mesh):
        for i in range(steps):
            given = states[-1]
            if i in poison:
                bad = jax.tree.map(lambda x: x * np.nan, given.params)
                given = dataclasses.replace(given, params=bad)
            state, report = step(given, batch(i))
            states.append(state)
            reports.append(report)
    return states, reports


def carried(state):
    """The router state by layer: ``(layers, E)``."""
    leaves = named_leaves(state)
    names = sorted(name for name in leaves if name.startswith("router_state/"))
    return np.concatenate([np.asarray(leaves[name]).reshape(-1, E) for name in names])


def demand(report):
    return np.stack([np.asarray(layer.counts.demand) for layer in report.layers])


def test_the_bias_follows_the_demand_of_every_step():
    states, reports = run(recipe(BIASED), steps=3)
    expected = np.zeros((2, E))
    np.testing.assert_array_equal(carried(states[0]), expected)
    for state, report in zip(states[1:], reports, strict=True):
        load = demand(report)
        assert load.sum(1).tolist() == [2 * ROWS * 11] * 2  # K choices of every valid token
        expected = expected + RATE * np.sign(load.mean(1, keepdims=True) - load)
        np.testing.assert_allclose(carried(state), expected, rtol=1e-6)
    assert len({tuple(layer) for layer in carried(states[-1])}) == 2, "layers carry their own"


def test_the_bias_follows_demand_where_capacity_binds():
    # One slot per expert and row: every expert is full or nearly so, whatever was asked of it.
    tight = dataclasses.replace(BIASED, capacity=Capacity(0.25, 0.25, minimum=1))
    (_, state), (report,) = run(recipe(tight))
    asked = demand(report)
    seated = np.stack([np.asarray(layer.counts.load) for layer in report.layers])
    assert asked.sum() == 2 * 2 * ROWS * 11 and seated.max() <= ROWS
    by_demand, by_load = (np.sign(x.mean(1, keepdims=True) - x) for x in (asked, seated))
    assert np.any(by_demand != by_load)
    np.testing.assert_allclose(carried(state), RATE * by_demand, rtol=1e-6)


def test_the_average_load_follows_the_demand_of_every_step():
    states, reports = run(recipe(AVERAGED), steps=2)
    expected = np.zeros((2, E))
    for state, report in zip(states[1:], reports, strict=True):
        load = demand(report)
        expected = 0.75 * expected + 0.25 * load / load.sum(1, keepdims=True)
        np.testing.assert_allclose(carried(state), expected, rtol=1e-5)
    # The first loss is of an average that knows nothing: zero; the second is not.
    first, second = (float(report.layers[0].losses["balance"]) for report in reports)
    assert first == 0.0 and second > 0.1


@pytest.mark.parametrize(
    ("microbatches", "remat", "scan"), [(4, "none", True), (1, "full", True), (2, "full", False)]
)
def test_accumulation_and_rematerialisation_count_every_token_once(microbatches, remat, scan):
    # A row is a group, and without capacity the parts route as the whole does.
    (_, plain), (report,) = alone()
    (_, other), (other_report,) = run(recipe(BIASED, remat=remat, scan=scan), 1, microbatches)
    np.testing.assert_array_equal(demand(other_report), demand(report))
    np.testing.assert_array_equal(carried(other), carried(plain))


def test_a_bias_from_scores_is_equal_on_any_number_of_devices_and_microbatches():
    # The state of all steps comes from integer counts: two steps are equal to the last bit, as far
    # as the first step's parameters are.
    (_, single), (report,) = run(recipe(QUANTILE))
    assert np.any(carried(single)) and report.layers[0].counts.observed["tokens"] == ROWS * 11
    (_, sharded), _ = run(recipe(QUANTILE, MeshConfig(4, 2)))
    (_, parts), _ = run(recipe(QUANTILE), microbatches=4)
    for other in (sharded, parts):
        np.testing.assert_array_equal(carried(other), carried(single))


def test_a_skipped_update_leaves_the_router_state_alone():
    states, reports = run(recipe(BIASED), steps=2, poison=(1,))
    assert [bool(report.updated) for report in reports] == [True, False]
    np.testing.assert_array_equal(carried(states[2]), carried(states[1]))
    assert np.any(carried(states[1]))


@pytest.mark.parametrize("mesh", [MeshConfig(4, 2), MeshConfig(1, 4, 2)])
def test_every_device_holds_the_state_of_the_single_device(mesh):
    (_, single), _ = alone()
    (_, sharded), _ = run(recipe(BIASED, mesh))
    np.testing.assert_array_equal(carried(sharded), carried(single))
    leaves = named_leaves(sharded)
    for name in (name for name in leaves if name.startswith("router_state/")):
        assert leaves[name].sharding.is_fully_replicated
        shards = [np.asarray(shard.data) for shard in leaves[name].addressable_shards]
        assert len(shards) == 8
        for shard in shards:
            np.testing.assert_array_equal(shard, shards[0])


def test_the_state_has_no_gradient_and_no_optimizer_statistics():
    made = recipe(BIASED)
    names = named_leaves(made.abstract()[1])
    assert any(name.startswith("router_state/") for name in names)
    assert not any("bias" in name for name in names if name.startswith(("params/", "opt_state/")))


def test_a_bias_moves_the_choice_and_not_the_gate():
    # Equal scores but for rounding: a bias on expert 3 sends everything there, at the gate of the
    # score alone.
    made = recipe(routing.preset("loss_free", k=1))
    router = made.model.moe.router
    logits = np.zeros((5, E), np.float32)
    state = {"bias": np.array([0, 0, 0, 1], np.float32)}
    plan = router(logits, capacity=5, state=state)
    np.testing.assert_array_equal(plan.counts.load, [0, 0, 0, 5])
    np.testing.assert_allclose(plan.combine.sum((1, 2)), 0.5)
