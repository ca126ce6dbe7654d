"""The file that is read first computes the values of the library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples import moe_from_scratch as scratch
from moe_jax import routing
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.mode import TRAIN
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import MoEConfig

TOKENS, EXPERTS, WIDTH, HIDDEN = 16, 4, 8, 12
# Twelve of sixteen tokens prefer expert 0, which has five slots: first choices are dropped, and
# second choices stand behind first ones.
SKEWED = jax.random.normal(jax.random.key(3), (TOKENS, EXPERTS)) + jnp.array([1.5, 0.5, 0, 0])
CASES = {
    "switch": (scratch.switch, routing.preset("switch", input_jitter=0.0)),
    "gshard": (scratch.gshard, routing.preset("gshard", capacity_factor=2.0)),
    "expert_choice": (scratch.expert_choice, routing.preset("expert_choice")),
}


def _same(plan, ours):
    dispatch, combine, loss = ours
    np.testing.assert_array_equal(plan.dispatch, dispatch)
    np.testing.assert_allclose(plan.combine, combine, rtol=1e-6, atol=1e-7)
    if "balance" in plan.losses:
        np.testing.assert_allclose(plan.losses["balance"], loss, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_plan_from_scratch_is_that_of_the_library(name):
    from_scratch, router = CASES[name]
    capacity = router.slots(TOKENS, EXPERTS, train=True)
    plan = router(SKEWED, capacity=capacity)
    _same(plan, from_scratch(SKEWED))
    if name != "expert_choice":
        assert plan.counts.load.sum() < plan.counts.demand.sum(), "the case drops no choice"


def test_the_random_second_expert_is_the_same_with_the_same_key():
    from_scratch, router = CASES["gshard"]
    key = jax.random.key(7)
    plan = router(SKEWED, capacity=router.slots(TOKENS, EXPERTS, train=True), rng=key)
    ours = from_scratch(SKEWED, key=key)
    _same(plan, ours)
    assert ours[0].sum() < from_scratch(SKEWED)[0].sum(), "the key gives up no second expert"


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_of_the_layer_are_those_of_the_library(name):
    from_scratch, router = CASES[name]
    config = MoEConfig(num_experts=EXPERTS, expert_dim=HIDDEN, group_size=TOKENS, router=router)
    network = FeedForwardConfig(WIDTH, HIDDEN, activation="relu")
    layer = ConfiguredMoE(config, network, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (1, TOKENS, WIDTH))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def ours(x, params):
        router, experts = params["router"], params["experts"]
        named = {"router": router["kernel"], "up": experts["up"], "down": experts["down"]}
        y, loss = scratch.moe(x[0], {k: v[...] for k, v in named.items()}, from_scratch)
        return (y**2).sum() + loss

    def theirs(x, params):
        y, aux = nnx.merge(graph, params, rest)(x, jnp.ones((1, TOKENS), bool), mode=TRAIN)
        return (y**2).sum() + aux.losses.get("balance", 0.0)

    value, gradient = jax.value_and_grad(ours, (0, 1))(x, params)
    wanted, expected = jax.value_and_grad(theirs, (0, 1))(x, params)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    jax.tree.map(
        lambda mine, other: np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5),
        gradient,
        expected,
    )
