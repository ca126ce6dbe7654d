"""Divergence of routing distributions: by hand, its gradient, and models that differ."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe_jax.config.routing_groups import check_routing
from moe_jax.errors import ConfigError
from moe_jax.models.places import places
from moe_jax.nn.router import RouterLayer
from moe_jax.routing import Router, Softmax, TopTokens
from moe_jax.routing.presets import gshard
from moe_jax.training.frozen import trained_only
from moe_jax.training.metrics import train_record
from moe_jax.training.routing_loss import divergence, grouped, routing_loss
from moe_jax.training.step import Objective, Teacher, train_step
from tests.training.test_step import batch, compiled, made, model, recipe

TEACHER = jnp.log(jnp.array([[0.4, 0.1, 0.3, 0.2]]))
STUDENT = jnp.log(jnp.array([[0.5, 0.5]]))


def test_the_teacher_s_shares_are_summed_over_groups():
    np.testing.assert_allclose(grouped(TEACHER, (0, 1, 0, 1)), [[0.7, 0.3]], rtol=1e-6)
    # Expert 3 is left out: 0.7 and 0.1 of 0.8 stay.
    np.testing.assert_allclose(grouped(TEACHER, (0, 1, 0, -1)), [[0.875, 0.125]], rtol=1e-6)
    np.testing.assert_allclose(grouped(TEACHER, ()), [[0.4, 0.1, 0.3, 0.2]], rtol=1e-6)


def test_the_divergence_by_hand():
    expected = 0.7 * math.log(0.7 / 0.5) + 0.3 * math.log(0.3 / 0.5)
    wanted = grouped(TEACHER, (0, 1, 0, 1))
    np.testing.assert_allclose(divergence(STUDENT, wanted), [expected], rtol=1e-5)
    np.testing.assert_allclose(divergence(jnp.log(wanted), wanted), [0], atol=1e-6)
    # A share of zero has no divergence, whatever the student's share is.
    np.testing.assert_allclose(divergence(STUDENT, jnp.array([[1.0, 0.0]])), [math.log(2)])


def test_the_loss_is_a_mean_over_layers_and_over_tokens_without_padding():
    ours, theirs = [jnp.stack([STUDENT, STUDENT], 1)] * 2, [jnp.stack([TEACHER, TEACHER], 1)] * 2
    valid = [jnp.array([[True, False]]), jnp.array([[True, True]])]
    counts = [jnp.float32(1), jnp.float32(4)]  # The second layer has two tokens in another part.
    found = routing_loss(ours, theirs, ((0, 1, 0, 1), (0, 0, 0, 1)), valid, counts)
    one = 0.7 * math.log(1.4) + 0.3 * math.log(0.6)
    two = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    np.testing.assert_allclose(found, (one + two * 2 / 4) / 2, rtol=1e-5)


def test_a_router_alone_gets_a_gradient():
    router = RouterLayer(gshard(), 4, 3, jax.random.key(0), 1.0)
    graph, state = nnx.split(router)
    tokens, valid = jax.random.normal(jax.random.key(1), (1, 2, 4)), jnp.ones((1, 2), bool)

    def first(state, tokens):
        return nnx.merge(graph, state).log_shares(tokens, valid)[..., 0].sum()

    of_state, of_tokens = jax.grad(first, argnums=(0, 1))(state, tokens)
    assert float(jnp.abs(of_state["kernel"][...]).max()) > 0.1
    np.testing.assert_array_equal(of_tokens, 0)
    shares = jnp.exp(nnx.merge(graph, state).log_shares(tokens, valid))
    np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-6)


def pair():
    """Graph and state of a student, its teacher with other weights, and the groups of experts."""
    student = dataclasses.replace(model(gshard(second="all")), dropout=0.0)
    leaves = {place.leaf for place in places(student).values()}
    others = {leaf for leaf in leaves if "router" not in leaf}  # so that the tokens stay
    made_by = recipe(student, None, trained_only(optax.adam(1e-2), others))
    graph, state = made(made_by)
    there, theirs = made(recipe(student, None, optax.identity()))
    params = jax.tree.map(lambda x: x * 1.5 + 0.1 * jnp.flip(x), theirs.params)
    return made_by, graph, state, Teacher(there, params, theirs.router_state)


def test_its_gradient_reaches_routers_alone_and_training_lowers_it():
    made_by, graph, state, teacher = pair()
    runs = {}
    for weight in (0.0, 1.0):
        objective = Objective(teacher_weight=0.0, routing_weight=weight)
        run = compiled(functools.partial(objective.value_and_gradient, graph))
        runs[weight] = run(state, batch(), teacher)
    assert runs[0.0].losses.routing_loss is None and runs[1.0].losses.routing_loss > 0
    more = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), runs[1.0][0], runs[0.0][0])
    names = {jax.tree_util.keystr(p): d for p, d in jax.tree_util.tree_flatten_with_path(more)[0]}
    assert max(d for n, d in names.items() if "router" in n) > 1e-4
    assert max(d for n, d in names.items() if "router" not in n) < 1e-6
    objective = Objective(teacher_weight=0.0, routing_weight=10.0)
    step = compiled(functools.partial(train_step, graph, made_by.optimizer, objective))
    lines = []
    for _ in range(8):
        state, report = step(state, batch(), teacher)
        lines.append(train_record(1, report, (0, 1), learning_rate=0.0, tokens_per_second=0.0))
    assert lines[-1]["routing_loss"] < 0.9 * lines[0]["routing_loss"]


def test_parts_of_a_batch_add_up():
    _, graph, state, teacher = pair()
    found = [
        compiled(
            functools.partial(
                Objective(n, teacher_weight=0.5, routing_weight=1.0).value_and_gradient, graph
            )
        )(state, batch(), teacher).losses.routing_loss
        for n in (1, 2)
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_models_that_cannot_be_compared_are_one_line():
    student = model(gshard())
    experts = student.sparse_layers()[0].moe.num_experts
    layers = len(student.sparse_layers())
    check_routing(student, student, ())
    check_routing(student, student, (tuple(range(experts)),) * layers)
    for teacher, groups, message in (
        (model(every=0), (), "its teacher 0"),
        (student, ((0,) * experts,) * layers, "in 1 groups of"),
        (student, (tuple(range(experts)),) * (layers + 1), "use equal numbers"),
        (model(Router(Softmax(), TopTokens())), (), "have no shares of feed-forward experts"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            check_routing(student, teacher, groups)
        assert "\n" not in str(error.value)
