import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.config.experiment import Experiment, TrainingConfig
from moe_jax.config.schema import build, describe
from moe_jax.config.setting_schedules import SettingSchedule, current
from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig
from moe_jax.nn.moe_config import MoEConfig


def values(schedule, steps):
    return [float(schedule.at(jnp.int32(step))) for step in steps]


# Between steps 11 and 31 a value goes from 1 to 3; step 16 is a quarter of the way, 21 the middle.
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [1, 1, 1.5, 2, 3, 3]),
        # Half a cosine has done (1 - cos(pi / 4)) / 2 = 0.146447 of the way after a quarter.
        ("cosine", [1, 1, 1.292893, 2, 3, 3]),
        ("steps", [1, 1, 1, 1, 3, 3]),
    ],
)
def test_each_shape_has_the_values_computed_by_hand(shape, expected):
    schedule = SettingSchedule("capacity_factor", (11, 31), (1.0, 3.0), shape)
    np.testing.assert_allclose(values(schedule, [1, 11, 16, 21, 31, 99]), expected, rtol=1e-6)


def test_several_pieces_follow_each_other_and_meet_their_values_exactly():
    schedule = SettingSchedule("balance_weight", (2, 4, 8), (0.1, 0.3, 0.0))
    # Down from 0.3 at step 4 to 0 at step 8: three quarters of it remain at step 5.
    found = values(schedule, [1, 2, 3, 4, 5, 8, 9])
    np.testing.assert_allclose(found, [0.1, 0.1, 0.2, 0.3, 0.225, 0, 0], rtol=1e-6)
    for step, value in zip(schedule.steps, schedule.values, strict=True):
        assert float(schedule.at(jnp.int32(step))) == np.float32(value)


def test_top_k_is_an_integer_and_one_step_makes_a_constant():
    schedule = SettingSchedule("top_k", (1, 5), (1, 2))
    assert values(schedule, [1, 2, 4, 5]) == [1, 1, 2, 2]  # 1, 1.25, 1.75, 2
    found = current((schedule, SettingSchedule("noise", (7,), (0.5,))), jnp.int32(3))
    assert found["top_k"].dtype == jnp.int32
    assert float(found["noise"]) == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("noise", (1, 2), (0.5,)), "has 2 steps and 1 values: give every step a value"),
        (("noise", (), ()), "has 0 steps and 0 values"),
        (("noise", (3, 3), (0.5, 1.0)), r"steps=\(3, 3\) must be steps in increasing order"),
        (("noise", (1,), (-0.5,)), r"values\[0\]=-0.5 must be at least 0"),
        (("input_jitter", (1,), (1.0,)), "values=1.0 must be at least 0 and below 1"),
        (("capacity_factor", (1,), (0.0,)), "values=0.0 must be above 0"),
        (("top_k", (1,), (0,)), "values=0 must be at least 1"),
        (("balance_weight", (1,), (float("nan"),)), "nan must be finite"),
    ],
)
def test_a_schedule_that_means_nothing_is_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        SettingSchedule(*arguments)
    assert "\n" not in str(error.value)


def experiment(router, *schedules, **settings):
    moe = MoEConfig(every=1, num_experts=256, router=router, allow_future_leak=True)
    model = DecoderConfig(num_layers=1, moe=moe, **settings)
    return Experiment("tiny", model, training=TrainingConfig(schedules=schedules))


SWITCH = routing.preset("switch", capacity_factor=1.5)


def one(setting, *values):
    return SettingSchedule(setting, tuple(range(1, len(values) + 1)), values)


@pytest.mark.parametrize(
    ("router", "schedules", "message"),
    [
        (
            SWITCH,
            [one("balance_wieght", 0.1)],
            "'balance_wieght', which no layer of this model reads in training.*balance_weight",
        ),
        (
            SWITCH,
            [one("capacity_factor", 1.0, 2.0)],
            "raises capacity_factor to 2, but model.moe.router allocates 1.5: give this router "
            "capacity_factor=2",
        ),
        (SWITCH, [one("top_k", 2)], "raises top_k to 2, but .* allocates 1: give this router k=2"),
        (SWITCH, [one("z_loss", 0.1), one("z_loss", 0.2)], "2 schedules of z_loss: give it one"),
        (SWITCH, [one("lookahead_weight", 0.1)], "'lookahead_weight', which no layer"),
        (routing.preset("expert_choice"), [one("top_k", 1)], "names 'top_k', which no layer"),
        (routing.preset("deepseek_v3"), [one("capacity_factor", 1.0)], "names 'capacity_factor'"),
    ],
)
def test_a_setting_that_cannot_change_is_one_line(router, schedules, message):
    run = experiment(router, *schedules)
    with pytest.raises(ConfigError, match=message) as error:
        run.check_settings()
    assert "\n" not in str(error.value)


def test_a_module_that_looks_ahead_and_a_conditional_network_have_weights_too():
    run = experiment(SWITCH, one("lookahead_weight", 0.3, 0.1), lookahead=1)
    run.check_settings()
    shared = dataclasses.replace(run.model.moe.shared, hidden=8, mix="conditional")
    moe = dataclasses.replace(run.model.moe, shared=shared)
    gated = dataclasses.replace(run.model, moe=moe)
    training = TrainingConfig(schedules=(one("conditional_gate_weight", 0.1, 0.0),))
    dataclasses.replace(run, model=gated, training=training).check_settings()
    with pytest.raises(ConfigError, match="conditional_gate_weight"):
        dataclasses.replace(run, training=training).check_settings()


def test_a_schedule_is_read_from_a_config_file():
    training = TrainingConfig(schedules=(SettingSchedule("noise", (1, 9), (1.0, 0.0), "cosine"),))
    assert build(TrainingConfig, describe(training)) == training
