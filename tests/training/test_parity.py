"""The whole training step on one device and on meshes of eight: gradients, losses, collectives."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from moe_jax import routing
from moe_jax.config.optimizer import OptimizerConfig
from moe_jax.config.schedules import Constant
from moe_jax.models import DecoderConfig
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.parallel.rules import spec
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import named_leaves
from moe_jax.training.step import Objective, train_step
from tests.matrix import covering
from tests.training.test_step import (
    LENGTH,
    ROWS,
    batch,
    bits,
    compiled,
    made,
    model,
    recipe,
)

ONE = (1, 1)
# data, expert, model, fsdp and sequence.
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8), (1, 4, 2), (1, 1, 1, 8), (1, 2, 2, 2), (2, 2, 1, 1, 2)]
ROUTERS = {
    "switch": routing.presets.switch(z_weight=1e-3),  # with its jitter
    "gshard": routing.presets.gshard(),  # with its random second expert
    "expert_choice": routing.presets.expert_choice(),
    "deepseek_v3": routing.presets.deepseek_v3(k=2, groups=4, keep_groups=2),
    "dropless": routing.presets.mixtral(),
}
EXCHANGES = {"expert_choice": "all_to_all", "dropless": "ring"}
BOUND = 3e-6  # of a gradient's largest entry: float32 sums in another order
DRIFT = 1e-4  # of a loss, in 20 steps
# Rows of unequal length, so that the devices have unequal numbers of tokens.
UNEVEN = np.arange(ROWS) * 5 % 13 + 4


def keep_gradient():
    """An optimizer that changes nothing and keeps the last gradient in its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, *_: (g, g)
    )


@functools.cache
def prepared(name, sizes):
    """The compiled step, a first state and where batches go."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    config = OptimizerConfig(schedule=Constant(), learning_rate=5e-3, warmup_steps=0)
    optimizer = optax.chain(keep_gradient(), make_optimizer(config, 20))
    settings = {"transport": "gather", "exchange": EXCHANGES.get(name, "gspmd")}
    graph, state = made(recipe(model(ROUTERS[name], every=2, **settings), mesh, optimizer))
    # Of the others, one with microbatches and its logits in chunks.
    objective = Objective(2, 4, 1e-3) if name == "expert_choice" else Objective()
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = compiled(
        functools.partial(train_step, graph, optimizer, objective), out_shardings=(shardings, None)
    )
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, spec("batch")))
    with jax.set_mesh(mesh):
        return step.lower(state, put(batch(UNEVEN))).compile(), state, put


@functools.cache
def trained(name, sizes):
    """The report and state after the first step, and the losses of twenty."""
    step, state, put = prepared(name, sizes)
    first, losses = None, []
    for number in range(20):
        state, report = step(state, put(batch(UNEVEN, seed=number % 2)))
        first = first or (report, state)
        losses.append(float(report.losses.loss))
    return *first, losses


def gradients(state):
    leaves = named_leaves(state).items()
    return {name: np.asarray(leaf) for name, leaf in leaves if name.startswith("opt_state/0/")}


@pytest.mark.parametrize(("name", "sizes"), covering(list(ROUTERS), MESHES))
def test_training_is_the_same_on_every_mesh(name, sizes):
    report, state, losses = trained(name, sizes)
    wanted, alone, expected_losses = trained(name, ONE)
    for field in ("loss", "objective"):
        found, expected = getattr(report.losses, field), getattr(wanted.losses, field)
        np.testing.assert_allclose(found, expected, rtol=BOUND)
    np.testing.assert_allclose(report.grad_norm, wanted.grad_norm, rtol=BOUND)
    for layer, other in zip(report.layers, wanted.layers, strict=True):
        assert bits(layer.counts) == bits(other.counts)
    assert bits(state.router_state) == bits(alone.router_state)
    assert (name == "deepseek_v3") == any(np.any(x) for x in jax.tree.leaves(state.router_state))
    found, expected = gradients(state), gradients(alone)
    assert len(found) == 19
    for leaf, gradient in expected.items():
        assert gradient.any(), leaf
        bound = BOUND * np.abs(gradient).max() + 1e-9
        np.testing.assert_allclose(found[leaf], gradient, rtol=0, atol=bound, err_msg=leaf)
    assert expected_losses[-1] < expected_losses[0] - 0.5  # it learns
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=DRIFT)


COLLECTIVES = ("all-to-all", "all-gather", "all-reduce", "collective-permute", "reduce-scatter")


def collectives(text):
    """Names and the element counts of what they make, one entry per operation."""
    found = []
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = [int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes]
            found.append((match[2], max(sizes)))
    return found


def test_collectives_are_found_in_text():
    text = """
  %a.1 = (f32[1,2,16]{2,1,0}, f32[1,2,16]{2,1,0}) all-to-all(%x, %y), channel_id=4
  %b = f32[] all-reduce(%c), to_apply=%add
  ROOT %d = s32[8,4]{1,0} all-gather-start(%e), dimensions={0}
  %f = f32[8]{0} add(%g, %all-to-all.5)
"""
    assert collectives(text) == [("all-to-all", 32), ("all-reduce", 1), ("all-gather", 32)]


@pytest.mark.parametrize("name", ["switch", "gshard"])
def test_a_step_with_one_mixture_layer_sends_slots_four_times_and_gathers_nothing_large(name):
    # There and back, forward and backward; jitter and the random second expert included.
    step, _, _ = prepared(name, (4, 2))
    found = collectives(step.as_text())
    assert [kind for kind, _ in found].count("all-to-all") == 4
    # Half the tokens' hidden states; a device's share of an expert matrix is 4 * 16 * 32.
    limit = min(ROWS * LENGTH * 16 // 2, 4 * 16 * 32)
    moved = [item for item in found if item[0] not in ("all-to-all", "all-reduce")]
    assert all(size < limit for _, size in moved), moved


@pytest.mark.parametrize("sizes", [(1, 8), (1, 1, 1, 8), (1, 2, 2, 2)], ids=str)
def test_gradients_of_scanned_layers_are_never_whole_on_a_device(sizes):
    # Four scanned layers in two microbatches: gradients are stacked, carried and added up.
    moe = MoEConfig(every=1, num_experts=8, expert_dim=40, group_size=LENGTH)
    config = DecoderConfig(
        num_layers=4, width=16, num_heads=2, head_dim=8, mlp_dim=24, remat="full", moe=moe
    )
    mesh = make_mesh(MeshConfig(*sizes))
    graph, state = recipe(config, mesh, optax.identity()).abstract()
    rows = NamedSharding(mesh, spec("batch"))
    shapes = {
        name: jax.ShapeDtypeStruct(rows_.shape, rows_.dtype, sharding=rows)
        for name, rows_ in batch(UNEVEN).items()
    }
    objective = Objective(microbatches=2)
    gradient = compiled(functools.partial(objective.value_and_gradient, graph))
    with jax.set_mesh(mesh):
        program = gradient.lower(state, shapes).compile()
    held = {
        tuple(map(int, shape.split(",")))
        for shape in re.findall(r"f32\[(4,[\d,]+)\]", program.as_text())
    }
    experts = 8 * 16 * 40
    assert max(math.prod(shape[1:]) for shape in held) == experts // 8
