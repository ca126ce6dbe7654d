"""Choices that are sent to the devices of their experts."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.parallel import MeshConfig, make_mesh, shardings_of_state
from moe_jax.routing import presets
from moe_jax.transport import RaggedExchange, implementation
from moe_jax.transport.ragged_exchange import buffer_rows, by_expert, within_buffers
from tests.transport.test_table import Layer

G, S, E, M = 8, 4, 8, 6
GROUPS = PartitionSpec(("data", "expert"))
X = np.random.default_rng(0).normal(size=(G, S, M)).astype(np.float32)


def test_received_rows_are_sorted_by_expert():
    # Three senders, two experts here. The rows arrive as a0 b0 b0 | a1 | b2, and one is unused.
    place, inverse = by_expert(jnp.array([[1, 2], [1, 0], [0, 1]]), 6)
    # Sorted: a0 a1 b0 b0 b2, and the unused row stays last.
    assert inverse.tolist() == [0, 3, 1, 2, 4, 5]
    assert place.tolist() == [0, 2, 3, 1, 4, 5]


def test_received_rows_of_one_expert_are_in_order():
    # Three senders and one expert here; the last of five rows is unused.
    place, inverse = by_expert(jnp.array([[2], [0], [2]]), 5)
    assert place.tolist() == inverse.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("buffer", "rows"), [(None, 40), (1.0, 10), (1.25, 13), (4.0, 40), (9.0, 40)]
)
def test_a_buffer_is_a_multiple_of_an_even_share(buffer, rows):
    # Ten choices on each of four devices: at most all forty choices meet on one device.
    assert buffer_rows(10, 4, buffer) == rows


@pytest.fixture(autouse=True, scope="module")
def fast_compilation():
    """Compiles quickly rather than well: these programs run once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def routed(kind):
    """Logits ``(G, S, E)`` and the mask of valid tokens of a routing regime."""
    logits = np.random.default_rng(1).normal(size=(G, S, E))
    logits[..., 0] += {"one hot expert": 20.0, "an empty expert": -20.0}.get(kind, 0.0)
    return logits.astype(np.float32), np.full((G, S), kind != "no token")


def outputs(dispatch, router, valid, experts, x, logits):
    """Returns the outputs of one layer, and the plan that was executed."""
    plan = router(logits, valid=valid)
    plan = dispatch.within(plan) if isinstance(dispatch, RaggedExchange) else plan
    return dispatch(experts, x, plan), plan


@functools.cache
def differentiated(dispatch, sizes):
    """Returns the jitted values, plan and gradients of a layer on a mesh, or on one device."""
    router = presets.mixtral()
    experts = FeedForwardConfig(M, 5, "silu", gated=True).experts(E, jax.random.key(0))

    def loss(experts, x, logits, valid):
        y, plan = outputs(dispatch, router, valid, experts, x, logits)
        return jnp.sin(y).sum(), (y, plan)

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    if sizes is None:
        return functools.partial(run, experts)
    mesh = make_mesh(MeshConfig(*sizes))
    experts = jax.device_put(experts, shardings_of_state(experts, mesh))

    def on_mesh(*arrays):
        with jax.set_mesh(mesh):
            return run(experts, *jax.device_put(arrays, NamedSharding(mesh, GROUPS)))

    return on_mesh


SLOTS = implementation(Layer("gather", "gspmd", presets.mixtral())).dispatch


@pytest.mark.parametrize("kind", ["plain", "one hot expert", "an empty expert", "no token"])
@pytest.mark.parametrize("sizes", [(4, 2), (2, 4), (1, 8)], ids=str)
def test_values_and_gradients_equal_slots_on_one_device(sizes, kind):
    logits, valid = routed(kind)
    expected = differentiated(SLOTS, None)(X, logits, valid)
    found = differentiated(RaggedExchange(), sizes)(X, logits, valid)
    (_, (y, plan)), gradients = found
    (_, (other, expected_plan)), expected_gradients = expected
    np.testing.assert_allclose(y, other, atol=1e-5)
    np.testing.assert_array_equal(plan.counts.load, expected_plan.counts.load)
    leaves, expected_leaves = map(jax.tree.leaves, (gradients, expected_gradients))
    for leaf, expected_leaf in zip(leaves, expected_leaves, strict=True):
        np.testing.assert_allclose(leaf, expected_leaf, atol=1e-5)


def test_choices_beyond_a_buffer_are_dropped_and_counted():
    # All tokens choose expert 0 and one other. Two shards of the experts hold 4 each; every device
    # has one group of 4 tokens, thus 8 choices, and a buffer of 1 share has 8 rows.
    logits, valid = routed("one hot expert")
    (_, (y, plan)), _ = differentiated(RaggedExchange(1.0), (4, 2))(X, logits, valid)
    slots, counts = jax.tree.map(np.asarray, (plan.slots, plan.counts))
    # Devices 2 i and 2 i + 1 share the experts: tokens of groups 2 i are the first to be seated.
    kept = slots.expert.reshape(4, 2 * S * 2)
    on_first = ((kept >= 0) & (kept < 4)).sum(1)
    assert (on_first <= 8).all() and (on_first == 8).any()
    first_group = slots.expert[::2]
    assert (first_group[..., 0] == 0).all()
    np.testing.assert_array_equal(counts.load.sum(-1), (slots.expert >= 0).sum((1, 2)))
    np.testing.assert_array_equal(counts.demand.sum(-1), np.full(G, S * 2))
    assert counts.dropped.sum() == (slots.expert < 0).sum() > 0
    np.testing.assert_array_equal(counts.unrouted, (slots.expert < 0).all(-1).sum(-1))
    np.testing.assert_array_equal(slots.gate[slots.expert < 0], 0)
    np.testing.assert_array_equal(slots.weight[~slots.filled], 0)
    assert slots.filled.sum() == (slots.expert >= 0).sum() == (slots.place < E * S).sum()
    # The outputs are those of slots for the same plan on one device.
    executed = dataclasses.replace(plan, slots=jax.device_get(plan.slots))
    experts = FeedForwardConfig(M, 5, "silu", gated=True).experts(E, jax.random.key(0))
    np.testing.assert_allclose(y, SLOTS(experts, jnp.asarray(X), executed), atol=1e-5)


def test_without_a_bound_the_plan_is_unchanged():
    plan = object()
    assert within_buffers(plan, None) is plan
    # Without a mesh there is one device, whose buffer holds every choice.
    assert within_buffers(plan, 1.0) is plan


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="the extra tpu is not installed")
def test_a_tpu_sends_choices_twice_and_back_with_the_gradient():
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    script = Path(__file__).with_name("tpu_programs.py")
    done = subprocess.run(
        [sys.executable, script],
        env=environment | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    none = {"all-to-all": 0, "collective-permute": 0, "reduce-scatter": 0}
    # Three products of gated experts, and two more for the gradient of each.
    assert found["forward"] == {"ragged-all-to-all": 2, **none, "kernels": 3}
    assert found["backward"] == {"ragged-all-to-all": 4, **none, "kernels": 9}
