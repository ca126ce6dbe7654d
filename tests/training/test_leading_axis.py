"""Checkpoints written when layers outside a scan had a leading axis of length 1."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax.config.optimizer import Adafactor, OptimizerConfig
from moe_jax.errors import CheckpointError
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.routing.presets import loss_free
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import from_named_leaves, named_leaves
from moe_jax.training.step import Objective, train_step
from tests.training.test_step import batch, bits, compiled, made, model, recipe

# A dense layer and one with experts whose router carries a bias; neither is scanned. Experts are
# 16 x 32, so that Adafactor keeps rows and columns of them, and whole statistics of the norms.
UNROLLED = dataclasses.replace(model(loss_free(), every=2), scan_layers=False)
OPTIMIZER = make_optimizer(OptimizerConfig(Adafactor(factored_from=8)), 20)


def old(leaves):
    """Every array of a layer as it was saved: its statistics of one number never had the axis."""
    return {
        name: leaf[None] if "/parts/" in name and leaf.shape != (1,) else leaf
        for name, leaf in leaves.items()
    }


def test_an_old_checkpoint_restores_bit_by_bit_and_trains_on(tmp_path):
    graph, start = made(recipe(UNROLLED, optimizer=OPTIMIZER))
    step = compiled(lambda state, batch: train_step(graph, OPTIMIZER, Objective(), state, batch))
    state, _ = step(start, batch())
    leaves = named_leaves(state)
    saved = old(leaves)
    assert any(name.startswith("router_state/") and saved[name].ndim == 2 for name in saved)
    assert saved["params/layers/parts/1/0/feed_forward/experts/up"].shape == (1, 8, 16, 32)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, saved, {})
        _, restored, _ = checkpoints.restore(named_leaves(recipe_shapes()))
    assert {n: x.shape for n, x in restored.items()} == {n: x.shape for n, x in leaves.items()}
    assert bits(restored) == bits(leaves)
    again, report = step(from_named_leaves(state, restored), batch(seed=1))
    expected, _ = step(state, batch(seed=1))
    assert bits(again) == bits(expected) and bool(report.updated)


def recipe_shapes(mesh=None):
    return recipe(UNROLLED, mesh, OPTIMIZER).abstract()[1]


def test_an_old_checkpoint_restores_on_a_mesh_and_in_part(tmp_path):
    mesh = make_mesh(MeshConfig(1, 2, 2, 2))
    _, state = made(recipe(UNROLLED, optimizer=OPTIMIZER))
    leaves, wanted = named_leaves(state), named_leaves(recipe_shapes(mesh))
    wanted = {name: leaf for name, leaf in wanted.items() if name.startswith("params/")}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, old(leaves), {})
        _, restored, _ = checkpoints.restore(wanted, partial=True)
    assert restored.keys() == wanted.keys()
    for name, leaf in restored.items():
        assert np.asarray(leaf).tobytes() == np.asarray(leaves[name]).tobytes(), name
        assert leaf.sharding.is_equivalent_to(wanted[name].sharding, leaf.ndim), name


@pytest.mark.parametrize("shape", [(2, 8), (1, 1, 8), (8, 1)])
def test_no_other_axis_is_dropped(tmp_path, shape):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"scale": jax.numpy.ones(shape)}, {})
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = jax.ShapeDtypeStruct((8,), jax.numpy.float32, sharding=sharding)
        with pytest.raises(CheckpointError, match=r"and float32\[8\] in the model"):
            checkpoints.restore({"scale": wanted})
