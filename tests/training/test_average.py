"""The average of the parameters: its values, its place in a state, and no cost where it is off."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from moe_jax.config.optimizer import SGD, OptimizerConfig
from moe_jax.config.schedules import Constant
from moe_jax.models import DecoderConfig
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.training.average import averaged_names, with_average
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import Recipe, named_leaves

RULE = SGD(momentum=0.0)
PLAIN = {"rule": RULE, "schedule": Constant(), "warmup_steps": 0, "clip_norm": 0.0}
SMALL = DecoderConfig(
    num_layers=1,
    width=16,
    num_heads=2,
    head_dim=8,
    moe=MoEConfig(every=1, num_experts=8, expert_dim=32, group_size=16),
)


def abstract(ema_decay, sizes=(2, 4)):
    optimizer = make_optimizer(OptimizerConfig(ema_decay=ema_decay), 20)
    return Recipe(SMALL, 64, optimizer, 0, make_mesh(MeshConfig(*sizes))).abstract()[1]


def params(value):
    return nnx.State({"w": nnx.Param(jnp.full((2, 3), value), axes=("embed", "mlp"))})


def averages(ema_decay, gradients, start=1.0):
    """Weight and average after each step of plain gradient descent at the rate 1."""
    optimizer = make_optimizer(
        OptimizerConfig(**PLAIN, learning_rate=1.0, ema_decay=ema_decay), steps=10
    )
    weights = params(start)
    carried = jax.jit(optimizer.init)(weights)
    found = []
    for gradient in gradients:
        updates, carried = jax.jit(optimizer.update)(params(gradient), carried, weights)
        weights = optax.apply_updates(weights, updates)
        average = optax.tree_utils.tree_get(carried, "average")
        found.append((float(weights["w"][0, 0]), float(average["w"][1, 2])))
    return found


def test_the_average_forgets_its_start_and_then_decays():
    # Weights 1, then 0, 2, 3. Of an average of 0.15, update t keeps t / (9 + t) at most: 0.1, then
    # 0.15 as 2/11 and 3/12 are above it.
    first = 0.1 * 1.0 + 0.9 * 0.0
    second = 0.15 * first + 0.85 * 2.0
    third = 0.15 * second + 0.85 * 3.0
    found = averages(0.15, [1.0, -2.0, -1.0])
    np.testing.assert_allclose(found, [(0.0, first), (2.0, second), (3.0, third)], rtol=1e-6)


def test_a_slow_average_is_warmed_up():
    # With 0.999, the shares that are kept of the average are 1/10, 2/11 and 3/12.
    expected, average, weight = [], 1.0, 1.0
    for t, gradient in enumerate([0.5, 0.5, 0.5], start=1):
        weight -= gradient
        kept = t / (9 + t)
        average = kept * average + (1 - kept) * weight
        expected.append((weight, average))
    np.testing.assert_allclose(averages(0.999, [0.5, 0.5, 0.5]), expected, rtol=1e-6)


def test_the_average_is_sharded_as_the_parameters():
    state = abstract(0.99)
    leaves = named_leaves(state)
    names = averaged_names(leaves)
    weights = {name for name in leaves if name.startswith("params/")}
    assert all("/average/" in names[name] for name in weights)
    assert all(names[name] == name for name in leaves if name not in weights)
    for name in weights:
        shape, average = leaves[name], leaves[names[name]]
        assert (average.shape, average.sharding) == (shape.shape, shape.sharding), name
    experts = "params/layers/parts/0/0/feed_forward/experts/up"
    assert not leaves[names[experts]].sharding.is_fully_replicated


def test_evaluation_reads_the_average():
    state = abstract(0.99)
    names, read = averaged_names(named_leaves(state)), named_leaves(with_average(state))
    assert len(read) == len(names)
    assert all(read[name] is named_leaves(state)[names[name]] for name in names)


def test_no_average_costs_nothing():
    without, state = abstract(0.0), abstract(0.99)
    leaves = named_leaves(without)
    assert with_average(without) is without
    assert averaged_names(leaves) == {name: name for name in leaves}
    # The average adds one copy of the parameters and one count, and nothing else.
    more = named_leaves(state).keys() - leaves.keys()
    assert len(more) == 1 + sum(name.startswith("params/") for name in leaves)


def test_the_first_state_may_be_donated():
    # The average is a copy: the same buffer in two places cannot be donated.
    optimizer = make_optimizer(OptimizerConfig(ema_decay=0.9), 5)
    weights = params(1.0)
    state = jax.jit(lambda w: (w, optimizer.init(w)))(weights)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    jax.block_until_ready(step(state))
