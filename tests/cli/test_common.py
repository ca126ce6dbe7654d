import dataclasses
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from absl import flags

from moe_jax.cli import common
from moe_jax.config.optimizer import Adafactor
from moe_jax.config.schedules import Cosine, RSqrt
from moe_jax.errors import CheckpointError, ConfigError, TrainingError
from moe_jax.nn.latent import Latent
from moe_jax.nn.positions import Rotary, T5Relative, YarnScaling
from moe_jax.routing import preset


def _no_flags(_):
    """A command without flags."""


@pytest.fixture
def line(capsys):
    """A function that runs a program through ``common.run`` and returns its one line on stderr."""

    def run(error):
        def main(_):
            raise error

        with pytest.raises(SystemExit) as stop:
            common.run(_no_flags, main, ["program"])
        assert stop.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (found,) = captured.err.splitlines()
        return found

    return run


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("steps=0 is wrong"),
        CheckpointError("steps=0 is wrong"),
        TrainingError("steps=0 is wrong"),
        FileNotFoundError("steps=0 is wrong"),
        PermissionError("steps=0 is wrong"),
        ValueError("steps=0\n  is wrong"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_user_can_mend_is_one_line(line, error):
    assert line(error) == "error: steps=0 is wrong"


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), AssertionError("x")])
def test_faults_of_the_program_keep_their_traceback(error):
    def main(_):
        raise error

    with pytest.raises(type(error)):
        common.run(_no_flags, main, ["program"])


@pytest.fixture
def experiment_of(monkeypatch):
    """A function from command-line arguments to the experiment."""

    def parse(*arguments):
        # ml_collections looks for overrides in sys.argv too.
        monkeypatch.setattr(sys, "argv", common.with_overrides(["program", *arguments]))
        values = flags.FlagValues()
        common.define_config(values)
        values(sys.argv)
        return common.experiment_of(values)

    return parse


QUICKSTART = f"--config={Path(__file__).parents[2] / 'configs' / 'quickstart.py'}"
SCHEDULE, ROUTER = "--config.optimizer.schedule", "--config.model.moe.router"


def test_config_is_asked_for(experiment_of):
    with pytest.raises(ConfigError, match="--config is missing"):
        experiment_of()


def test_overrides_change_the_config_file(experiment_of):
    experiment = experiment_of(QUICKSTART, "--config.mesh.expert=4", f"{SCHEDULE}.final=0.5")
    assert experiment.mesh.expert == 4
    assert experiment.optimizer.schedule == Cosine(0.5)


def test_tuples_and_what_is_in_them_can_be_overridden(experiment_of):
    moe = experiment_of(QUICKSTART, "--config.model.moe.layers=(0, 2)").model.moe
    assert moe.moe_layers(4) == (0, 2)
    other = '({"layers": (1,), "router": {"preset": "gshard"}, "num_experts": 4},)'
    moe = experiment_of(QUICKSTART, f"--config.model.moe.overrides={other}").model.moe
    assert moe.at(1).router == preset("gshard") and moe.at(1).num_experts == 4
    assert moe.at(3) == dataclasses.replace(moe, every=1, overrides=())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--config.a.b=1=2"], ["--override=a.b=1=2"]),
        (["--config.a", "5", "--x"], ["--override=a=5", "--x"]),
        (["-config.a=5"], ["--override=a=5"]),
        (["--config.a", "--x"], ["--override=a", "--x"]),
        (["--noconfig.a"], ["--override=a=false"]),
        (["--config=f.py:z", "--workdir=w"], ["--config=f.py:z", "--workdir=w"]),
    ],
)
def test_settings_are_overrides_in_whatever_form_they_are_given(given, expected):
    assert common.with_overrides(given) == expected


def test_names_in_a_list_are_separated_by_commas(experiment_of):
    for text in ("tensorboard,wandb", "tensorboard, wandb", "('tensorboard', 'wandb')"):
        training = experiment_of(QUICKSTART, f"--config.training.writers={text}").training
        assert training.writers == ("tensorboard", "wandb")
    assert experiment_of(QUICKSTART, "--config.training.writers=()").training.writers == ()
    with pytest.raises(ConfigError, match="'wandbb' is not one of tensorboard, wandb"):
        experiment_of(QUICKSTART, "--config.training.writers=wandbb")


def test_a_switch_needs_no_value(experiment_of):
    assert experiment_of(QUICKSTART, "--config.model.gated").model.gated
    assert not experiment_of(QUICKSTART, "--noconfig.model.gated").model.gated


def test_what_the_file_leaves_out_can_be_set(experiment_of):
    experiment = experiment_of(
        QUICKSTART,
        "--config.data.eval_documents=4",
        "--config.data.data_dir=/tmp/x",
        f"{ROUTER}.z_weight=0.25",
    )
    assert experiment.data.eval_documents == 4
    assert str(experiment.data.data_dir) == "/tmp/x"
    expected = preset("switch", z_weight=0.25, capacity_factor=1.25, eval_capacity_factor=2.0)
    assert experiment.model.moe.router == expected


def test_another_type_forgets_what_the_file_chose_for_the_old_one(experiment_of):
    assert experiment_of(QUICKSTART, f"{SCHEDULE}.type=RSqrt").optimizer.schedule == RSqrt()
    rule = experiment_of(
        QUICKSTART,
        "--config.optimizer.rule.type=Adafactor",
        "--config.optimizer.rule.decay_rate=0.7",
    ).optimizer.rule
    assert rule == Adafactor(decay_rate=0.7)


def test_parts_of_a_model_can_be_of_another_type(experiment_of):
    model = experiment_of(
        QUICKSTART,
        "--config.model.attention.type=Latent",
        "--config.model.attention.kv_rank=16",
        "--config.model.positions.interleaved=True",
        "--config.model.moe.gated=True",
    ).model
    assert model.attention == Latent(kv_rank=16) and model.moe.gated
    assert model.positions == Rotary(interleaved=True)
    positions = "--config.model.positions"
    scaling = f"{positions}.scaling"
    model = experiment_of(QUICKSTART, f"{scaling}.type=YarnScaling", f"{scaling}.factor=8.0").model
    assert model.positions == Rotary(scaling=YarnScaling(factor=8.0))
    model = experiment_of(
        QUICKSTART, f"{positions}.type=T5Relative", f"{positions}.buckets=8"
    ).model
    assert model.positions == T5Relative(buckets=8)


def test_another_preset_forgets_choices_it_does_not_have(experiment_of):
    # quickstart:gshard sets both capacity factors, which both presets have.
    moe = experiment_of(f"{QUICKSTART}:gshard", f"{ROUTER}.preset=top2_mtf").model.moe
    assert moe.router == preset("top2_mtf", capacity_factor=2.5, eval_capacity_factor=4.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"{SCHEDULE}.type=RSqrt", f"{SCHEDULE}.final=0.5"], "final is not a setting"),
        ([f"{SCHEDULE}.type=RSqrtt"], "type='RSqrtt' is unknown; did you mean 'RSqrt'"),
        ([f"{ROUTER}.second=all"], "router.second is not a setting"),
    ],
)
def test_settings_of_another_type_are_refused(experiment_of, arguments, message):
    with pytest.raises(ConfigError, match=message):
        experiment_of(QUICKSTART, *arguments)


@pytest.fixture
def program(monkeypatch, capsys):
    """A function from arguments to the one line that a program with ``--config`` ends with."""

    def run(*arguments):
        # A module of this name that was loaded before would be loaded into.
        monkeypatch.delitem(sys.modules, "config_config", raising=False)
        argv = ["program", *map(str, arguments)]
        with pytest.raises(SystemExit) as stop:
            common.run(common.define_config, common.experiment_of, argv)
        assert stop.value.code == 2
        (found,) = capsys.readouterr().err.splitlines()
        return found

    return run


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:\n", "line 1: SyntaxError: invalid syntax"),
        ("import nothing_here\n", "line 1: ModuleNotFoundError: No module named 'nothing_here'"),
        ("def get_config():\n    return {}['a']\n", "line 2: KeyError: 'a'"),
        ("def get_config():\n    return int('a b')\n", "line 2: ValueError: invalid literal"),
        ("def get_config():\n    raise OSError('full')\n", "line 2: OSError: full"),
        ("raise SystemExit(3)\n", "line 1: SystemExit: 3"),
        ("\0", "Error: source code string cannot contain null bytes"),
        ("x = 1\n", "has no function get_config()"),
        ("def get_config():\n    pass\n", "returns NoneType, not a ConfigDict"),
        ("def get_config():\n    return 3\n", "returns int, not a ConfigDict"),
    ],
)
def test_a_broken_config_file_is_one_line_with_file_and_place(program, tmp_path, text, said):
    file = tmp_path / "broken.py"
    file.write_text(text)
    line = program(f"--config={file}")
    assert str(file) in line
    assert said in line


def test_a_config_that_is_no_file_is_named(program, tmp_path):
    for path in (tmp_path, tmp_path / "nothing.py", ""):
        assert f"--config={path} is not a file" in program("--config", path)
        assert f"--config={path} is not a file" in program(f"--config={path}:variant")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config.model.moe.layers=(1,"], "flag --config.model.moe.layers=(1,"),
        (["--config.model.width=wide"], "flag --config.model.width=wide"),
        (["--config.model.gated=perhaps"], "flag --config.model.gated=perhaps"),
        (["--config.model.moe=3"], "flag --config.model.moe=3"),
        (["--config.training.steps"], "Missing value for flag --config.training.steps"),
        (["--config.model.wdith=3"], "config.model.wdith is not a setting; did you mean 'width'?"),
        (
            ["--confg.model.width=3"],
            "the setting is --config.model.width",
        ),
        (
            ["--config.model.type=Decodr", "--config.model.moe.every=1"],
            "config.model.type='Decodr' is unknown; did you mean 'DecoderConfig'?",
        ),
    ],
)
def test_a_setting_that_cannot_be_read_is_named(program, arguments, said):
    assert said in program(QUICKSTART, *arguments)


def test_a_value_error_of_jax_is_a_fault_of_the_program():
    with pytest.raises(ValueError, match="same shape"):
        common.run(_no_flags, lambda _: jnp.stack([jnp.zeros(2), jnp.zeros(3)]), ["program"])


@pytest.mark.parametrize(("text", "step"), [("7", 7), ("0", 0), ("best", "best")])
def test_a_step_is_a_number_or_best(text, step):
    values = flags.FlagValues()
    common.define_step(values)
    values(["program", f"--step={text}"])
    assert values.step == step


@pytest.mark.parametrize("text", ["last", "-1", "1.5"])
def test_another_step_is_refused(text):
    values = flags.FlagValues()
    common.define_step(values)
    with pytest.raises(flags.IllegalFlagValueError, match=f"flag --step={text}"):
        values(["program", f"--step={text}"])


def test_the_command_line_can_be_run_again(monkeypatch):
    command = ["moe-jax train", "--config=a b.py", "--override=model.moe.layers=(0, 2)"]
    monkeypatch.setattr(sys, "argv", command)
    expected = "moe-jax train '--config=a b.py' '--config.model.moe.layers=(0, 2)'"
    assert common.command_line() == expected
