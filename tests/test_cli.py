import pytest
from absl import app

from moe_jax import cli
from moe_jax.errors import ConfigError
from moe_jax.training.checkpoint import CheckpointError
from moe_jax.training.loop import TrainingError


@pytest.fixture
def line(monkeypatch, capsys):
    """A function that runs a program through ``cli.run`` and returns its one line on stderr."""
    monkeypatch.setattr(app, "run", lambda main, flags_parser: main(["program"]))

    def run(error):
        def main():
            raise error

        with pytest.raises(SystemExit) as stop:
            cli.run(main)
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
def test_faults_of_the_program_keep_their_traceback(monkeypatch, error):
    monkeypatch.setattr(app, "run", lambda main, flags_parser: main(["program"]))

    def main():
        raise error

    with pytest.raises(type(error)):
        cli.run(main)


class _Flag:
    def __init__(self, value):
        self.value = value


def test_config_is_asked_for():
    with pytest.raises(ConfigError, match="--config is missing"):
        cli.experiment_of(_Flag(None))


def test_config_becomes_an_experiment():
    assert cli.experiment_of(_Flag({"name": "x"})).name == "x"
