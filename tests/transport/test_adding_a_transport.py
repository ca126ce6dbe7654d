"""A new transport is one module and one line, which the layer, the checks and planning follow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_jax.configs import quickstart

from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import build
from moe_jax.errors import ConfigError
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.mode import TRAIN
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.planning import roofline
from moe_jax.routing import presets
from moe_jax.transport import TABLE
from tests.transport.example_transport import LINE


@pytest.fixture(autouse=True)
def one_line(monkeypatch):
    """The line at the end of the table."""
    monkeypatch.setattr("moe_jax.transport.table.TABLE", (*TABLE, LINE))


def test_the_layer_has_the_values_and_gradients_of_the_others():
    router = presets.gshard(capacity_factor=0.5)
    x = jax.random.normal(jax.random.key(1), (2, 8, 4))
    valid = jnp.arange(16).reshape(2, 8) % 5 > 0

    def results(transport):
        config = MoEConfig(
            num_experts=4, expert_dim=6, group_size=8, router=router, transport=transport
        )
        moe = ConfiguredMoE(config, FeedForwardConfig(4, 6), jax.random.key(0))

        def objective(moe, x):
            y, aux = moe(x, valid, mode=TRAIN, rng=jax.random.key(2))
            return jnp.sin(y).sum() + aux.loss, y

        return jax.jit(jax.grad(objective, (0, 1), has_aux=True))(moe, x)

    found, expected = results("everywhere"), results("einsum")
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_layer_that_it_cannot_serve_is_refused():
    with pytest.raises(ConfigError, match="transport='everywhere' requires .* without dropout"):
        MoEConfig(transport="everywhere", expert_dropout=0.1)
    experiment = build(Experiment, quickstart.get_config())
    moe = dataclasses.replace(experiment.model.moe, transport="everywhere")
    model = dataclasses.replace(experiment.model, moe=moe)
    mesh = dataclasses.replace(experiment.mesh, expert=2)
    with pytest.raises(ConfigError, match="'everywhere' requires all experts on each device"):
        dataclasses.replace(experiment, model=model, mesh=mesh).check_program(2)


def test_planning_takes_its_cost_from_the_line():
    experiment = build(Experiment, quickstart.get_config())

    def work(transport):
        moe = dataclasses.replace(experiment.model.moe, transport=transport)
        model = dataclasses.replace(experiment.model, moe=moe)
        return roofline.work(dataclasses.replace(experiment, model=model))

    # The line says that it computes slots and has products of einsum's size.
    assert work("everywhere") == work("einsum") != work("gather")
