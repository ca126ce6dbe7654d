import dataclasses
from typing import Literal

import pytest
from ml_collections import ConfigDict

from moe_jax import routing
from moe_jax.config.experiment import Experiment
from moe_jax.config.optimizer import Adafactor, OptimizerConfig, RSqrt
from moe_jax.config.schema import build, describe
from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig
from moe_jax.nn.moe_config import MoEConfig
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
