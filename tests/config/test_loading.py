import dataclasses

import pytest

from moe_jax.config.loading import experiment_of, load_config
from moe_jax.config.schedules import RSqrt
from moe_jax.errors import ConfigError

FILE = """
from moe_jax.configs import quickstart

def get_config(variant="switch"):
    config = quickstart.get_config(variant)
    config.name = "mine-" + variant
    return config
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_a_config_is_a_name_a_file_settings_or_an_experiment(file):
    by_name = experiment_of("quickstart:gshard")
    assert by_name.model.moe.num_experts == 16
    assert experiment_of("configs/quickstart.py:gshard") == by_name
    assert experiment_of(load_config("quickstart:gshard")) == by_name
    assert experiment_of(by_name) is by_name
    named = dataclasses.replace(by_name, name="mine-gshard")
    assert experiment_of(f"{file}:gshard") == named
    assert experiment_of(file).name == "mine-switch"


def test_overrides_hold_whatever_the_config_is():
    changes = {"training.steps": 7, "model.moe.layers": (0, 2)}
    for config in ("quickstart", load_config("quickstart"), experiment_of("quickstart")):
        experiment = experiment_of(config, changes)
        assert experiment.training.steps == 7 and experiment.model.moe.layers == (0, 2)


def test_settings_that_are_passed_stay_as_they_are():
    config = load_config("quickstart")
    experiment_of(config, {"optimizer.schedule.type": "RSqrt", "training.steps": 7})
    assert config == load_config("quickstart")


def test_another_type_forgets_what_the_file_chose_for_the_old_one():
    # The quickstart sets ``final`` of a cosine, which this schedule does not have.
    experiment = experiment_of("quickstart", {"optimizer.schedule.type": "RSqrt"})
    assert experiment.optimizer.schedule == RSqrt()


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        ("quickstrt", {}, "no config has this name; did you mean 'quickstart'?"),
        ("quickstart:swich", {}, "unknown variant 'swich'; known: switch"),
        (
            "quickstart",
            {"model.wdith": 3},
            "config.model.wdith is not a setting; did you mean 'width'?",
        ),
        ("quickstart", {"modl.width": 3}, "config.modl is not a setting; did you mean 'model'?"),
        (
            "quickstart",
            {"model.width.x": 3},
            "config.model.width is not a group of settings: it has no x",
        ),
        ("quickstart", {"model.width": "wide"}, "config.model.width='wide' must be int, not str"),
        ("quickstart", {"model.width": 0}, "config.model.width=0"),
        ("quickstart", {"model.moe": 3}, "config.model.moe=3 must be a group of settings"),
        ("quickstart", {"model.num_heads": 3, "model.num_kv_heads": 2}, "model.num_heads=3"),
        (
            "quickstart",
            {"model.moe.router.second": "all"},
            "config.model.moe.router.second is not a setting",
        ),
    ],
)
def test_what_is_wrong_is_named_in_one_line(config, changes, said):
    with pytest.raises(ConfigError) as refusal:
        experiment_of(config, changes)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:\n", "line 1: SyntaxError: invalid syntax"),
        ("def get_config():\n    return {}['a']\n", "line 2: KeyError: 'a'"),
        ("raise SystemExit(3)\n", "line 1: SystemExit: 3"),
        ("x = 1\n", "has no function get_config()"),
        ("def get_config():\n    pass\n", "returns NoneType, not a ConfigDict"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, text, said):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        load_config(path)
    assert said in str(refusal.value) and str(path) in str(refusal.value)
