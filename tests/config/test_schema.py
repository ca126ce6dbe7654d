import dataclasses
from typing import Literal

import pytest
from ml_collections import ConfigDict

from moe_jax import routing
from moe_jax.config.experiment import Experiment
from moe_jax.config.optimizer import Adafactor, AdamW, OptimizerConfig
from moe_jax.config.schedules import RSqrt
from moe_jax.config.schema import build, describe, from_text, override, settings
from moe_jax.data import DataConfig
from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.positions import Rotary, YarnScaling
from moe_jax.routing.presets import PRESETS, choices_of, preset


@dataclasses.dataclass(frozen=True)
class Part:
    size: int
    rate: float = 0.5
    kind: Literal["round", "flat"] = "round"
    note: str | None = None
    on: bool = True

    def __post_init__(self):
        if self.size < 0:
            raise ValueError("size is negative")


@dataclasses.dataclass(frozen=True)
class Whole:
    part: Part = Part(1)
    parts: tuple[Part, ...] = ()


def test_builds_nested_values():
    made = build(Whole, {"part": {"size": 3, "rate": 2}, "parts": [{"size": 4, "kind": "flat"}]})
    assert made == Whole(Part(3, 2.0), (Part(4, kind="flat"),))
    assert isinstance(made.part.rate, float)


def test_takes_a_config_dict():
    assert build(Whole, ConfigDict({"part": {"size": 3, "note": "x"}})).part == Part(3, note="x")


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"prat": {}}, ["config.prat", "'part'"]),
        ({"part": {"size": 1, "raet": 1.0}}, ["config.part.raet", "'rate'"]),
        ({"part": {"rate": 1.0}}, ["config.part", "needs size"]),
        ({"part": {"size": "3"}}, ["config.part.size='3'", "int", "str"]),
        ({"part": {"size": 3.0}}, ["config.part.size=3.0", "int", "float"]),
        ({"part": {"size": True}}, ["config.part.size=True", "int", "bool"]),
        ({"part": {"size": None}}, ["config.part.size=None", "int"]),
        ({"part": {"size": 1, "rate": True}}, ["config.part.rate=True", "float"]),
        ({"part": {"size": 1, "on": 1}}, ["config.part.on=1", "bool"]),
        ({"part": {"size": 1, "note": 7}}, ["config.part.note=7", "str"]),
        ({"part": {"size": 1, "kind": "odd"}}, ["config.part.kind='odd'", "round, flat"]),
        ({"part": {"size": -1}}, ["config.part: size is negative"]),
        ({"part": 3}, ["config.part=3", "group of settings"]),
        ({"parts": [{"size": 1}, {"size": "x"}]}, ["config.parts[1].size='x'"]),
        ({"parts": 3}, ["config.parts=3"]),
    ],
)
def test_refuses_what_does_not_fit(values, parts):
    with pytest.raises(ConfigError) as error:
        build(Whole, values)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_type_chooses_among_dataclasses():
    values = {"rule": {"type": "Adafactor", "decay_rate": 0.7}, "schedule": {"type": "RSqrt"}}
    made = build(OptimizerConfig, values)
    assert made == OptimizerConfig(Adafactor(decay_rate=0.7), RSqrt())


@pytest.mark.parametrize("name", ["Adafactro", None])
def test_refuses_an_unknown_type(name):
    with pytest.raises(ConfigError, match=r"config.rule.type=.* 'Adafactor'|config.rule.type"):
        build(OptimizerConfig, {"rule": {"type": name}})


@pytest.mark.parametrize("function", PRESETS, ids=lambda function: function.__name__)
def test_router_is_a_preset_or_its_parts(function):
    name = function.__name__
    choices = {"capacity_factor": 1.5} if "capacity_factor" in choices_of(name) else {}
    by_name = build(MoEConfig, {"num_experts": 16, "router": {"preset": name, **choices}})
    assert by_name.router == preset(name, **choices)
    in_parts = build(MoEConfig, {"num_experts": 16, "router": describe(by_name.router)})
    assert in_parts == by_name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "gshrad"}, "config.router: unknown router 'gshrad'; did you mean 'gshard'"),
        ({"preset": "switch", "z_wieght": 1.0}, "config.router: .*'z_wieght'.*'z_weight'"),
        ({"select": {"type": "TopK", "kk": 2}}, "config.router.select.kk"),
    ],
)
def test_refuses_an_unknown_router(values, message):
    with pytest.raises(ConfigError, match=message):
        build(MoEConfig, {"router": values})


def test_described_experiment_is_plain_and_builds_the_same():
    moe = MoEConfig(router=preset("top2_mtf", second_balance_weight=0.1), every=1)
    optimizer = OptimizerConfig(Adafactor(), RSqrt())
    experiment = Experiment("x", DecoderConfig(moe=moe), optimizer=optimizer)
    described = describe(experiment)
    _assert_plain(described)
    assert described["optimizer"]["rule"]["type"] == "Adafactor"
    assert build(Experiment, described) == experiment
    assert isinstance(experiment.model.moe.router, routing.Router)


def _assert_plain(value):
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value)
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _assert_plain(item)
    else:
        assert value is None or type(value) in (str, int, float, bool)


# ---------------------------------------------------------------- settings by dotted name


def changed(changes, value=None):
    """The optimizer's settings, or those of another dataclass, with some of them changed."""
    value = value or OptimizerConfig(Adafactor(decay_rate=0.7), RSqrt())
    config = settings(value)
    override(type(value), config, changes)
    return build(type(value), config)


def test_a_part_of_another_type_loses_the_settings_that_the_new_one_lacks():
    made = changed({"rule.type": "AdamW", "rule.weight_decay": 0.2, "clip_norm": 2.0})
    assert made == OptimizerConfig(AdamW(weight_decay=0.2), RSqrt(), clip_norm=2.0)


def test_the_same_type_loses_nothing():
    assert changed({"rule.type": "Adafactor"}).rule == Adafactor(decay_rate=0.7)


def test_a_preset_takes_the_place_of_a_routers_parts_and_of_other_choices():
    moe = MoEConfig(router=preset("gshard", capacity_factor=3.0))
    made = changed({"router.preset": "switch", "router.z_weight": 0.5}, moe)
    assert made.router == preset("switch", z_weight=0.5)


def test_a_part_that_is_left_out_is_an_empty_group_that_can_be_filled():
    config = settings(DecoderConfig())
    assert config.positions.scaling.to_dict() == {}
    assert build(DecoderConfig, config) == DecoderConfig()
    config.positions.scaling.type = "YarnScaling"
    config.positions.scaling.factor = 4.0
    scaling = build(DecoderConfig, config).positions.scaling
    assert scaling == YarnScaling(factor=4.0)
    # And left out again.
    assert changed({"positions.scaling": None}, DecoderConfig()).positions.scaling is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_nrom": 1.0}, r"config.clip_nrom is not a setting; did you mean 'clip_norm'"),
        ({"rule.momentum": 1.0}, "config.rule.momentum is not a setting"),
        ({"rlue.type": "AdamW"}, "config.rlue is not a setting; did you mean 'rule'"),
        ({"rule.type": "AdmaW"}, "config.rule.type='AdmaW' is unknown; did you mean 'AdamW'"),
        ({"clip_norm.high": 1.0}, "config.clip_norm is not a group of settings"),
        ({"clip_norm": -1.0}, "config.clip_norm=-1.0 must be at least 0"),
    ],
)
def test_a_setting_that_does_not_exist_is_refused_in_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        changed(changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (int, "16", 16),
        (int, "-3", -3),
        (float, "1e-3", 0.001),
        (float, "2", 2.0),
        (bool, "True", True),
        (bool | None, "false", False),
        (bool | None, "None", None),
        (int | None, "7", 7),
        (str, "None", "None"),
        (str | None, "7", "7"),
        (Literal["none", "full"], "none", "none"),
        (tuple[int, ...], "(1, 2)", (1, 2)),
        (tuple[int, ...], "[1, 2]", (1, 2)),
        (tuple[int, ...], "3", (3,)),
        (tuple[Part, ...], '({"size": 1},)', ({"size": 1},)),
        (Part | None, "None", None),
        (Part, "{'size': 1}", {"size": 1}),
    ],
)
def test_text_is_read_by_the_type_of_the_setting(hint, text, value):
    found = from_text(hint, text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("hint", "text"),
    [(int, "1e3"), (int, "None"), (float, "wide"), (bool, "perhaps"), (Part, "3"), (Part, "(1,")],
)
def test_text_of_another_type_is_refused(hint, text):
    with pytest.raises(ValueError, match="."):
        from_text(hint, text)


def test_old_files_say_none_for_each_setting_of_a_part_that_is_left_out():
    spans = {"sentinels": None, "noise_density": None}
    scaling = {"type": None, "factor": None}
    assert build(DataConfig, {"spans": spans}) == DataConfig()
    assert build(Rotary, {"scaling": scaling}) == Rotary()
    assert build(MoEConfig, {"router": {"preset": "switch", "k": None}}).router == preset("switch")
