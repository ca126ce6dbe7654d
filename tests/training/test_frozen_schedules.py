"""Groups of parameters that a schedule freezes at some steps of one compiled training step."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from moe_jax.config.experiment import Experiment, TrainingConfig
from moe_jax.config.frozen_schedules import FrozenStage, frozen_stages
from moe_jax.config.optimizer import SGD, AdamW, OptimizerConfig
from moe_jax.config.schedules import Constant
from moe_jax.config.setting_schedules import SettingSchedule
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.training.average import averaged_names, with_average
from moe_jax.training.frozen import paused
from moe_jax.training.optimizer import make_optimizer, optimizer_of
from moe_jax.training.state import Recipe, from_named_leaves, named_leaves
from moe_jax.training.step import Objective, train_step
from tests.matrix import sample
from tests.training.test_frozen import FROZEN, LAYER, MODEL, NAMES, RULES, batch, values, weights

ROUTER = f"{LAYER}/feed_forward/router/kernel"
BIAS = "router_state/layers/parts/0/0/feed_forward/router/state/bias"
TWICE = dataclasses.replace(MODEL, num_layers=2, scan_layers=True, remat="full")
WEIGHTS = ("params/", "router_state/")


def freezing(group, steps, values):
    return SettingSchedule(f"frozen/{group}", steps, values, "steps")


def experiment(frozen=(), schedules=(), model=MODEL, microbatches=1, **optimizer):
    settings = {"warmup_steps": 0, "learning_rate": 0.1} | optimizer
    training = TrainingConfig(steps=20, microbatches=microbatches, schedules=schedules)
    config = Experiment(
        "tiny", model, optimizer=OptimizerConfig(frozen=frozen, **settings), training=training
    )
    config.check_settings()
    return config


@functools.cache
def program(config, devices=1):
    """The compiled step of a run, its mesh and its first state."""
    mesh = make_mesh(MeshConfig(2, 4) if devices == 8 else MeshConfig(1), jax.devices()[:devices])
    made = Recipe(config.model, 16, optimizer_of(config), 0, mesh)
    graph, state = made.create()
    step = functools.partial(train_step, graph, made.optimizer, Objective.of(config))
    return jax.jit(step, compiler_options={"xla_backend_optimization_level": 0}), mesh, state


def steps(config, count, state=None, first=0, devices=1):
    """The states and the reports of some steps, each with its own batch."""
    step, mesh, start = program(config, devices)
    states, reports = [start if state is None else state], []
    with jax.set_mesh(mesh):
        for number in range(first, first + count):
            state, report = step(states[-1], batch(number))
            states.append(state)
            reports.append(report)
    return [values(state) for state in states], reports


def bits(leaves, prefix=WEIGHTS):
    return {name: leaf.tobytes() for name, leaf in leaves.items() if name.startswith(prefix)}


def moved(before, after):
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}


@pytest.mark.parametrize(
    ("settings", "devices"),
    [({"ema_decay": 0.5}, 8), ({"model": TWICE, "microbatches": 2}, 1)],
    ids=["eight_devices", "scanned_in_microbatches"],
)
def test_a_group_that_is_frozen_at_every_step_is_a_frozen_group(settings, devices):
    groups = ("router", "embedding", "norms")
    scheduled = experiment(schedules=tuple(freezing(g, (1,), (1,)) for g in groups), **settings)
    found, reports = steps(scheduled, 3, devices=devices)
    expected, others = steps(experiment(groups, **settings), 3, devices=devices)
    for after, other in zip(found, expected, strict=True):
        assert bits(after) == bits(other)
    assert [float(r.grad_norm) for r in reports] == [float(r.grad_norm) for r in others]
    if "ema_decay" in settings:
        averages = averaged_names(found[-1])
        for name in averages.keys() & NAMES:  # the average of what stays keeps its bits too
            assert averages[name] == name or (
                found[-1][averages[name]].tobytes() == found[0][name].tobytes()
            )


# The router trains at step 3 alone.
PAUSES = (freezing("router", (1, 3, 4), (1, 0, 1)),)


def test_a_frozen_group_keeps_weights_moments_and_count_and_moves_while_it_trains():
    (start, *after), reports = steps(experiment(schedules=PAUSES), 5)
    for before, now, trains in zip((start, *after), after, (0, 0, 1, 0, 0), strict=False):
        of_group = {name for name in before if "router" in name or "/stage_0/" in name}
        assert {ROUTER, BIAS} < of_group and len(of_group) == 5  # two moments, one count
        changed = moved(before, now)
        assert of_group & changed == (of_group if trains else set())
        assert set(bits(before)) - {ROUTER, BIAS} < changed
    assert [int(report.settings["frozen/router"]) for report in reports] == [1, 1, 0, 1, 1]
    counts = {name: int(leaf) for name, leaf in after[-1].items() if name.endswith("count")}
    assert sorted(counts.values()) == [1, 5, 5]  # router, other parameters, learning rate
    assert program(experiment(schedules=PAUSES))[0]._cache_size() <= 2


def test_a_thawed_group_trains_as_in_a_second_run_made_by_hand():
    # SGD has no count, so a run that freezes nothing goes on from the state of the first one: the
    # momentum of the router is zero, and the learning rate has the step of the run.
    rule = {"rule": SGD(0.9, weight_decay=0.1), "clip_norm": 0.1}
    found, _ = steps(experiment(schedules=(freezing("router", (1, 3), (1, 0)),), **rule), 4)
    first, _ = steps(experiment(("router",), **rule), 2)
    assert bits(found[2]) == bits(first[2])
    second = experiment(**rule)
    like = program(second)[2]
    inside = "opt_state/inner_states/trained/inner_state/"
    carried = {name.replace(inside, "opt_state/"): leaf for name, leaf in first[2].items()}
    zeros = {name: leaf for name, leaf in values(like).items() if name not in carried}
    assert [name.rpartition("trace/")[2] for name in zeros] == [ROUTER.removeprefix("params/")]
    again = from_named_leaves(like, jax.device_put(zeros | carried))
    expected, _ = steps(second, 2, again, first=2)
    assert bits(found[4]) == bits(expected[2])


def test_a_run_that_goes_on_from_a_saved_state_is_the_whole_run():
    config = experiment(schedules=PAUSES, ema_decay=0.5)
    whole, _ = steps(config, 4)
    for saved in (1, 2, 3):
        again = from_named_leaves(program(config)[2], jax.device_put(whole[saved]))
        assert bits(steps(config, 4 - saved, again, first=saved)[0][-1], "") == bits(whole[4], "")


def test_the_average_of_a_frozen_group_goes_on_to_its_value():
    # The router trains at step 1 alone; d is t / (9 + t), at most 0.5. From an average a1 and a
    # value p1, two updates leave 2/11 * 3/12 of their distance.
    config = experiment(schedules=(freezing("router", (1, 2), (0, 1)),), ema_decay=0.5)
    (start, one, _, three), _ = steps(config, 3)
    name = averaged_names(one)[ROUTER]
    np.testing.assert_allclose(one[name], 0.1 * start[ROUTER] + 0.9 * one[ROUTER], rtol=1e-5)
    left = (one[name] - one[ROUTER]) * 2 / 11 * 3 / 12
    np.testing.assert_allclose(three[name], three[ROUTER] + left, rtol=1e-5)


def test_frozen_and_scheduled_groups_meet_in_one_run():
    # Layer 0 is frozen at step 1, its norms and the table always, and the router at step 2 too.
    schedules = (freezing("layers/0", (1, 2), (1, 0)), freezing("router", (1, 3), (1, 0)))
    config = experiment(("embedding", "layers/0/norms"), schedules)
    assert {stage.groups for stage in config.frozen_stages} == {("layers/0",), ("router",)}
    after, _ = steps(config, 3)
    params = set(bits(after[0]))
    always = NAMES - {ROUTER, BIAS}
    layer = {name for name in params if "layers/parts/0/0/" in name}
    frozen = [always | layer, always | {ROUTER, BIAS}, always]
    for (before, now), still in zip(zip(after, after[1:], strict=False), frozen, strict=True):
        assert moved(before, now) & params == params - still


# ---------------------------------------------------------------- the optimizer alone


@pytest.mark.parametrize("rule", sample(RULES, part=3))
def test_each_rule_starts_anew_with_a_group_that_was_frozen_from_the_start(rule):
    config = OptimizerConfig(rule, Constant(), learning_rate=0.1, warmup_steps=0, clip_norm=0)
    stage = FrozenStage(freezing("b", (1, 3), (1, 0)), ("b",), frozenset({"params/b"}))
    optimizer, plain = make_optimizer(config, 10, [stage]), make_optimizer(config, 10)
    a, b, *gradients = np.random.default_rng(0).normal(size=(6, 3, 4))
    both, alone, other = weights(a=a, b=b), weights(b=b), weights(a=a)
    state, of_alone, of_other = (
        one.init(params) for one, params in ((optimizer, both), (plain, alone), (plain, other))
    )
    for number, gradient in enumerate(gradients):
        frozen = {"params/b": np.bool_(number < 2)}
        given = weights(a=gradient, b=-gradient * (number >= 2))
        updates, state = optimizer.update(given, state, both, frozen=frozen)
        both = optax.apply_updates(both, updates)
        updates, of_other = plain.update(weights(a=gradient), of_other, other)
        other = optax.apply_updates(other, updates)
        if number >= 2:
            updates, of_alone = plain.update(weights(b=-gradient), of_alone, alone)
            alone = optax.apply_updates(alone, updates)
        np.testing.assert_array_equal(both["b"][...], alone["b"][...])
        np.testing.assert_array_equal(both["a"][...], other["a"][...])


def test_weights_decay_only_while_they_train():
    # Without a gradient AdamW changes a weight by its decay alone: 2 becomes 2 * (1 - 0.5).
    rule = paused(
        AdamW(weight_decay=0.5).transform(OptimizerConfig().decayed),
        [FrozenStage(freezing("b", (1, 2), (1, 0)), ("b",), frozenset({"params/b"}))],
    )
    params, zero = weights(a=[[2]], b=[[2]]), weights(a=[[0]], b=[[0]])
    for frozen, update in ((True, 0.0), (False, 1.0)):
        found, _ = rule.update(zero, rule.init(params), params, frozen={"params/b": frozen})
        assert (float(found["a"][...][0, 0]), float(found["b"][...][0, 0])) == (1.0, update)


def test_groups_of_the_same_steps_are_one_stage_and_a_run_without_them_has_none():
    assert experiment(schedules=()).frozen_stages == ()
    both = tuple(freezing(group, (1, 5), (1, 0)) for group in FROZEN)
    (stage,) = frozen_stages(both, MODEL)
    assert (stage.groups, stage.leaves) == (FROZEN, NAMES)
    state = program(experiment(schedules=both))[2]
    assert jax.tree.structure(with_average(state)) == jax.tree.structure(state)
    assert sum("/stage_0/" in name for name in named_leaves(state)) == 1 + 2 * 4
