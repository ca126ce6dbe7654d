"""Schedules of frozen groups: their steps, and the combinations that mean nothing."""

import dataclasses

import jax.numpy as jnp
import pytest

from moe_jax.config.frozen_schedules import frozen_stages
from moe_jax.config.loading import experiment_of, experiment_of_texts
from moe_jax.config.setting_schedules import SettingSchedule
from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig
from moe_jax.nn.moe_config import MoEConfig

MODEL = DecoderConfig(
    num_layers=2, width=8, num_heads=2, head_dim=4, moe=MoEConfig(every=1, num_experts=2)
)


def one(group, steps, values, **more):
    return {"setting": f"frozen/{group}", "steps": steps, "values": values, "shape": "steps"} | more


def built(*schedules):
    return tuple(SettingSchedule(**schedule) for schedule in schedules)


@pytest.mark.parametrize(
    ("steps", "values", "frozen", "spans"),
    [
        ((1, 4), (1, 0), [1, 1, 1, 0, 0, 0], "steps 1 to 3"),
        ((4,), (1,), [1, 1, 1, 1, 1, 1], "from step 1 on"),
        ((2, 3, 4), (0, 1, 0), [0, 0, 1, 0, 0, 0], "step 3"),
        ((1, 2, 4, 6), (1, 1, 0, 1), [1, 1, 1, 0, 0, 1], "steps 1 to 3, from step 6 on"),
        ((3,), (0,), [0, 0, 0, 0, 0, 0], ""),
    ],
)
def test_the_frozen_steps_are_those_of_the_value_1(steps, values, frozen, spans):
    (stage,) = frozen_stages(built(one("router", steps, values)), MODEL)
    assert [stage.holds(step) for step in range(1, 7)] == [bool(x) for x in frozen]
    assert [int(stage.schedule.at(jnp.int32(step))) for step in range(1, 7)] == frozen
    assert stage.spans() == spans


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": (1, 0.5)}, r"SettingSchedule\('frozen/router'\).values=0.5 must be 1 \(frozen"),
        ({"values": (2, 0)}, r"values=2 must be 1 \(frozen\) or 0 \(trained\)"),
        ({"shape": "linear"}, r"shape='linear' must be 'steps', since a group is frozen or"),
        ({"shape": "cosine"}, "shape='cosine' must be 'steps'"),
    ],
)
def test_a_group_is_frozen_or_trained(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        SettingSchedule(**one("router", (1, 9), (1, 0)) | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("schedules", "frozen", "message"),
    [
        ([one("rooter", (1, 9), (1, 0))], (), "training.schedules has no group 'rooter'; did you"),
        (
            [one("router", (1, 9), (1, 0))],
            ("router",),
            "names frozen/router, but optimizer.frozen freezes router at all steps: leave it out",
        ),
        ([one("router", (1, 9), (1, 0))], ("layers",), "optimizer.frozen freezes router at all"),
        (
            [one("router", (1,), (1,)), one("router", (2,), (1,))],
            (),
            "training.schedules has 2 schedules of frozen/router: give it one",
        ),
        (
            [one(group, (1, 9), (0, 1)) for group in ("layers", "norms")],
            ("embedding",),
            "training.schedules leaves no parameter to train at step 9: leave one group out",
        ),
        (
            [one("", (1,), (1,)) | {"setting": "frozn/router"}],
            (),
            "'frozn/router', which no layer of this model reads in training; did you mean "
            "'frozen/GROUP'",
        ),
    ],
)
def test_a_schedule_that_freezes_nothing_or_everything_is_one_line(schedules, frozen, message):
    settings = {"training.schedules": tuple(schedules), "optimizer.frozen": frozen}
    with pytest.raises(ConfigError, match=message) as error:
        experiment_of("quickstart", settings)
    assert "\n" not in str(error.value)


def test_an_unknown_group_has_the_message_of_a_frozen_group():
    messages = []
    for settings in (
        {"training.schedules": (one("layers/9", (1, 9), (1, 0)),)},
        {"optimizer.frozen": ("layers/9",)},
    ):
        with pytest.raises(ConfigError) as error:
            experiment_of("quickstart", settings)
        messages.append(str(error.value).partition(" has no ")[2])
    assert messages[0] == messages[1] != ""


def test_layers_of_one_scan_are_frozen_together():
    scanned = dataclasses.replace(MODEL, scan_layers=True)
    first, second = (one(f"layers/{layer}", (1, 9), (1, 0)) for layer in (0, 1))
    with pytest.raises(ConfigError, match="set model.scan_layers=False, or name both layers"):
        frozen_stages(built(first), scanned)
    (stage,) = frozen_stages(built(first, second), scanned)
    assert stage.groups == ("layers/0", "layers/1")
    apart = dataclasses.replace(MODEL, scan_layers=False)
    assert len(frozen_stages(built(first, second | {"steps": (1, 5)}), apart)) == 2


def test_a_command_line_freezes_a_group_at_some_steps():
    text = '({"setting": "frozen/router", "steps": (1, 100), "values": (1, 0), "shape": "steps"},)'
    found, _ = experiment_of_texts("quickstart", {"training.schedules": text})
    (stage,) = found.frozen_stages
    assert (stage.groups, stage.spans()) == (("router",), "steps 1 to 99")
    assert found.frozen_leaves == frozenset()
