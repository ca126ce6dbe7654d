"""A step with a teacher: its loss by hand, in parts, on meshes, and beside one without."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from moe_jax.errors import ConfigError
from moe_jax.nn.mode import EVAL, TRAIN
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.parallel.rules import spec
from moe_jax.routing.presets import gshard, switch
from moe_jax.training.metrics import train_record
from moe_jax.training.step import Objective, Teacher, train_step
from tests.training.test_step import (
    LENGTH,
    LENGTHS,
    batch,
    bits,
    close,
    compiled,
    made,
    model,
    recipe,
)

WEIGHT = 0.25
STUDENT = dataclasses.replace(model(every=0), dropout=0.1)
# Wider than the student, with a capacity in evaluation that its training does not have.
TEACHER = dataclasses.replace(
    model(gshard(eval_capacity_factor=4.0)), width=24, num_heads=3, dropout=0.5
)


def teacher(mesh=None, scale=1.0):
    graph, state = made(recipe(TEACHER, mesh, optax.identity()))
    params = jax.tree.map(lambda x: jnp.multiply(scale, x), state.params)
    return Teacher(graph, params, state.router_state)


@functools.cache
def measured(weight=WEIGHT, microbatches=1, loss_chunk=0, sizes=(1,)):
    """Gradient, losses and reports of the student; without a teacher if it has no weight."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    graph, state = made(recipe(STUDENT, mesh))
    objective = Objective(microbatches, loss_chunk, 1e-3, teacher_weight=weight)
    whole = jax.device_put(batch(), NamedSharding(mesh, spec("batch")))
    step = compiled(functools.partial(objective.value_and_gradient, graph))
    with jax.set_mesh(mesh):
        return step(state, whole, None if weight is None else teacher(mesh))


def test_the_loss_by_hand():
    whole, valid = batch(), np.arange(LENGTH)[None] < LENGTHS[:, None]
    probabilities = np.asarray(compiled(by_teacher)(teacher(), whole), np.float64)
    assert probabilities.max(-1).mean() > 0.1  # far from even, 1/64
    _, losses, *_ = measured()
    _, alone, *_ = measured(None)
    assert alone.distillation_loss is None
    np.testing.assert_allclose(losses.loss, alone.loss, rtol=1e-6)
    log = by_student(whole)
    expected = -(probabilities * log).sum(-1)[valid].mean()
    np.testing.assert_allclose(losses.distillation_loss, expected, rtol=1e-5)
    apart = losses.distillation_loss - losses.loss
    assert abs(apart) > 0.01
    np.testing.assert_allclose(losses.objective - alone.objective, WEIGHT * apart, rtol=1e-3)


def by_teacher(teacher, whole):
    """Probabilities of the teacher in evaluation."""
    merged = nnx.merge(teacher.graph, teacher.params, teacher.router_state)
    return jax.nn.softmax(merged.logits(merged.read(whole, mode=EVAL).hidden))


def by_student(whole):
    """Log-probabilities under the student with the dropout of the step."""
    graph, state = made(recipe(STUDENT))
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

    def read(state, whole, key):
        merged = nnx.merge(graph, state.params, state.router_state)
        return jax.nn.log_softmax(merged.logits(merged.read(whole, mode=TRAIN, rng=key).hidden))

    found = compiled(read)(state, whole, jax.random.split(key, 1)[0])
    return np.asarray(found, np.float64)


def test_a_teacher_without_weight_changes_nothing():
    gradient, losses, *_ = measured(0.0)
    wanted, wanted_losses, *_ = measured(None)
    close(gradient, wanted)
    close(dataclasses.replace(losses, distillation_loss=None), wanted_losses)


# Parts and chunks draw other dropout, so without it.
@pytest.mark.parametrize(("microbatches", "loss_chunk"), [(1, 4), (4, 8)])
def test_in_parts_it_is_that_of_the_whole(microbatches, loss_chunk, monkeypatch):
    monkeypatch.setitem(globals(), "STUDENT", model(every=0))
    run = measured.__wrapped__
    found, wanted = run(0.5, microbatches, loss_chunk), run(0.5)
    close(found[0], wanted[0], 5e-6)
    close(found[1:], wanted[1:])


@pytest.mark.parametrize("sizes", [(4, 2), (1, 2, 1, 2, 2)], ids=str)
def test_it_is_the_same_on_every_mesh(sizes):
    found, wanted = measured(0.5, 2, 4, sizes), measured(0.5, 2, 4)
    close(found[0], wanted[0], 5e-6)
    close(found[1:], wanted[1:], 3e-6)


def test_a_step_learns_takes_the_teacher_as_an_argument_and_says_both_losses():
    graph, state = made(recipe(STUDENT))
    optimizer = recipe(STUDENT).optimizer
    step = compiled(functools.partial(train_step, graph, optimizer, Objective(teacher_weight=1.0)))
    lowered = step.lower(state, batch(), teacher()).as_text()
    header = lowered[lowered.index("@main(") :]
    count = len(jax.tree.leaves((state, batch(), teacher())))
    # Less what a step does not read.
    assert header[: header.index("{\n")].count("tensor<") >= count
    records = []
    for _ in range(10):
        state, report = step(state, batch(), teacher())
        records.append(train_record(1, report, (), learning_rate=0.0, tokens_per_second=0.0))
    assert records[-1]["distillation_loss"] < records[0]["distillation_loss"]
    assert records[0]["loss"] != records[0]["distillation_loss"]
    programs = step._cache_size()
    _, other = step(state, batch(), teacher(scale=2.0))
    assert step._cache_size() == programs
    assert other.losses.distillation_loss != report.losses.distillation_loss


def test_a_teacher_routes_by_itself_where_a_routing_is_forced():
    forced = batch() | {"routing": (np.zeros((16, LENGTH, 1), np.int16),)}
    hidden = compiled(lambda t, b: t.read(b)[1].hidden)
    assert bits(hidden(teacher(), forced)) == bits(hidden(teacher(), batch()))


def test_a_teacher_that_is_not_there_is_missed():
    graph, state = made(recipe(model(switch(), every=0)))
    with pytest.raises(ConfigError, match="does not load training.teacher"):
        Objective(teacher_weight=0.5).value_and_gradient(graph, state, batch())
