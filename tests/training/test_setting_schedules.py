"""Settings that change from step to step in one compiled training step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.config.frozen_schedules import frozen_stages
from moe_jax.config.optimizer import OptimizerConfig
from moe_jax.config.setting_schedules import SettingSchedule, check_schedules
from moe_jax.models import DecoderConfig, EncoderDecoderConfig
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.planning.compile import batch_shapes
from moe_jax.routing import Capacity, GaussianNoise, LoadBalance, Router, Softmax, TopK, ZLoss
from moe_jax.training.metrics import train_record
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import from_named_leaves, named_leaves
from moe_jax.training.step import Objective, eval_step, train_step
from tests.training.test_step import LENGTH, batch, bits, close, compiled, made, recipe

NOISE, JITTER, K, FACTOR, BALANCE, ROUTER_Z, HEAD_Z = 0.5, 0.125, 2, 1.5, 0.1, 0.01, 0.001
ROUTER = Router(
    Softmax(noise=GaussianNoise(NOISE)),
    TopK(K),
    (LoadBalance(BALANCE), ZLoss(ROUTER_Z)),
    Capacity(FACTOR, minimum=1),
    input_jitter=JITTER,
)
CONSTANT = {
    "noise": NOISE,
    "input_jitter": JITTER,
    "top_k": K,
    "capacity_factor": FACTOR,
    "balance_weight": BALANCE,
    "z_weight": ROUTER_Z,
    "z_loss": HEAD_Z,
}
OPTIMIZER = make_optimizer(OptimizerConfig(warmup_steps=0), 20)


def model(router=ROUTER, **settings):
    moe = MoEConfig(
        every=1, num_experts=4, expert_dim=16, group_size=LENGTH, router=router, **settings
    )
    sizes = {"width": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 32}
    return DecoderConfig(num_layers=1, moe=dataclasses.replace(moe, **settings), **sizes)


def constant(**values):
    return tuple(SettingSchedule(name, (1,), (value,)) for name, value in values.items())


@functools.cache
def stepper(schedules=(), mesh=None):
    """The compiled step of one model under schedules; its first state."""
    stages = frozen_stages(schedules, model())
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), 20, stages)
    graph, state = made(recipe(model(), mesh and make_mesh(MeshConfig(*mesh)), optimizer))
    objective = Objective(z_loss=HEAD_Z, schedules=schedules, stages=stages)
    return compiled(functools.partial(train_step, graph, optimizer, objective)), state


# The factor rises from 0.5 to 1.5 in three steps, the second expert comes at step 3, and the weight
# of the balance doubles at step 2. The router is frozen at the first two steps.
CHANGES = (
    SettingSchedule("capacity_factor", (1, 3), (0.5, 1.5)),
    SettingSchedule("top_k", (1, 3), (1, 2), "steps"),
    SettingSchedule("balance_weight", (1, 2), (0.1, 0.2), "steps"),
    SettingSchedule("noise", (1, 5), (0.5, 0.0), "cosine"),
    SettingSchedule("frozen/router", (1, 3), (1, 0), "steps"),
)


def after(count, state=None, first=0, schedules=CHANGES):
    """The state and the report after some steps, each with its own batch."""
    step, start = stepper(schedules)
    state, report = start if state is None else state, None
    for number in range(first, count):
        state, report = step(state, batch(seed=number))
    return state, report


def test_constant_schedules_train_as_the_settings_of_these_values():
    scheduled, report = after(2, schedules=constant(**CONSTANT))
    plain, expected = after(2, schedules=())
    close(report.losses, expected.losses)
    close(scheduled.params, plain.params)
    assert bits(report.layers[0].counts) == bits(expected.layers[0].counts)
    assert {name: float(value) for name, value in report.settings.items()} == pytest.approx(
        CONSTANT
    )
    assert expected.settings == {}


def test_one_program_has_the_values_of_every_step_and_the_log_shows_them():
    step, _ = stepper(CHANGES)
    found = {schedule.setting: [] for schedule in CHANGES}
    demand, dropped, programs = [], [], []
    for count in (1, 2, 3):
        _, report = after(count)
        line = train_record(
            count, jax.device_get(report), [0], learning_rate=0, tokens_per_second=1
        )
        for name, value in line["settings"].items():
            found[name].append(value)
        demand.append(float(report.layers[0].counts.demand.sum()))
        dropped.append(line["dropped_fraction"])
        programs.append(step._cache_size())
    assert found["capacity_factor"] == [0.5, 1.0, 1.5]
    assert found["top_k"] == [1, 1, 2]
    assert found["frozen/router"] == [1, 1, 0]
    np.testing.assert_allclose(found["balance_weight"], [0.1, 0.2, 0.2], rtol=1e-6)
    # 0.5 times (1 + cos(pi / 4)) / 2 after a quarter of the cosine.
    np.testing.assert_allclose(found["noise"], [0.5, 0.426777, 0.25], rtol=1e-5)
    assert demand == [123, 123, 246]  # 123 tokens, then two experts for each of them
    assert dropped[0] > dropped[1]
    # The first state has other shardings than its successors; no value makes another program.
    assert programs[1] == programs[2]


def test_a_run_that_goes_on_from_a_saved_state_is_the_whole_run():
    whole, _ = after(3)
    saved, _ = after(1)
    leaves = {name: np.array(leaf) for name, leaf in named_leaves(saved).items()}
    again = jax.device_put(from_named_leaves(saved, leaves))
    assert bits(after(3, again, first=1)[0]) == bits(whole)


def test_the_gradient_of_the_balance_is_proportional_to_its_weight():
    router = dataclasses.replace(ROUTER, score=Softmax(), input_jitter=0.0)
    graph, state = made(recipe(model(router)))
    weights = SettingSchedule("balance_weight", (1, 2, 3), (0.0, 0.1, 0.3), "steps")
    objective = Objective(schedules=(weights,))
    gradient = compiled(functools.partial(objective.value_and_gradient, graph))
    none, one, three = (
        gradient(dataclasses.replace(state, step=jnp.int32(step)), batch()).gradient
        for step in range(3)
    )
    differences = [jax.tree.map(jnp.subtract, other, none) for other in (one, three)]
    for small, large in zip(*map(jax.tree.leaves, differences), strict=True):
        np.testing.assert_allclose(3 * small, large, atol=1e-7)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(differences[0])) > 1e-4


def test_a_validation_reads_the_settings_of_the_model():
    _, state = stepper(CHANGES)
    graph, _ = recipe(model(), optimizer=OPTIMIZER).abstract()
    given = batch() | {"bytes": batch()["inputs"]}
    step = compiled(functools.partial(eval_step, graph, 0))
    sums = step(state.params, state.router_state, given)
    # Two experts for each of 123 tokens, also while training gives them one.
    assert sums.layers[0].demand.sum() == 246


def test_eight_devices_follow_schedules_as_one_device_does():
    one, expected = after(3)
    step, state = stepper(CHANGES, (4, 2))
    with jax.set_mesh(make_mesh(MeshConfig(4, 2))):
        for number in range(3):
            state, report = step(state, batch(seed=number))
    close(report.losses, expected.losses, 1e-5)
    assert bits(report.settings) == bits(expected.settings)
    close(report.layers[0].counts, expected.layers[0].counts)


EXPERT_CHOICE = routing.preset("expert_choice")
KINDS = {
    "scanned_and_rematerialised": (
        dataclasses.replace(model(), num_layers=2, remat="full"),
        ["top_k", "capacity_factor", "noise", "balance_weight"],
    ),
    "latent": (model(latent_dim=8), ["top_k", "capacity_factor"]),
    "experts_choose": (model(EXPERT_CHOICE, allow_future_leak=True), ["capacity_factor"]),
    "carried": (model(routing.preset("zaya")), ["input_jitter"]),
    "free_experts": (model(routing.preset("moe_plus_plus")), ["balance_weight", "top_k"]),
    "lookahead": (dataclasses.replace(model(), lookahead=1), ["lookahead_weight", "top_k"]),
    "dense_first_layer": (
        dataclasses.replace(model(), num_layers=2, moe=dataclasses.replace(model().moe, every=2)),
        ["top_k", "z_weight"],
    ),
    "encoder_decoder": (
        EncoderDecoderConfig(
            encoder_layers=1,
            decoder_layers=1,
            width=16,
            num_heads=2,
            head_dim=8,
            mlp_dim=32,
            encoder_moe=model().moe,
            decoder_moe=model().moe,
        ),
        ["top_k", "capacity_factor", "input_jitter"],
    ),
}
ONES = {"top_k": 1, "input_jitter": 0.5, "noise": 0.1}


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_model_reads_the_values_of_a_step(kind):
    config, names = KINDS[kind]
    schedules = constant(**{name: ONES.get(name, 0.2) for name in names})
    check_schedules(schedules, config)
    graph, state = recipe(config, optimizer=OPTIMIZER).abstract()
    shapes = batch_shapes(config, 4, LENGTH, LENGTH if kind == "encoder_decoder" else 0)
    given = {name: jax.ShapeDtypeStruct(shape, np.int32) for name, shape in shapes.items()}

    def program(objective):
        step = functools.partial(train_step, graph, OPTIMIZER, objective)
        return jax.make_jaxpr(step)(state, given)

    scheduled = str(program(Objective(schedules=schedules)))
    assert scheduled != str(program(Objective()))
