"""What the command shows of itself, and what it answers to a mistake of a new user."""

import importlib
import re

import pytest
from absl import flags, logging

from moe_jax.cli import main
from tests.system.runs import ROOT, command


@pytest.fixture(autouse=True)
def verbosity():
    """Gives the next test the verbosity of the log that was there before."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture
def moe_jax(capsys, monkeypatch):
    """A function from arguments to exit code, stdout and stderr of the command in this process."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["moe-jax", *map(str, arguments)])
        code = 0
        try:
            main.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_without_a_command_it_shows_what_there_is(moe_jax, arguments):
    code, out, err = moe_jax(*arguments)
    assert (code, err) == (0, "")
    for name, what in main.COMMANDS.items():
        assert re.search(rf"^  {name} +{what}$", out, re.MULTILINE)
    for text in ("moe-jax train quickstart", "COMMAND --help", "moe-jax settings", "quickstart,"):
        assert text in out


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_lists_every_flag_and_where_settings_are(moe_jax, name):
    code, out, err = moe_jax(name, "--help")
    assert (code, err) == (0, "")
    values = flags.FlagValues()
    importlib.import_module(f"moe_jax.cli.{name}").define(values)
    shown = re.findall(r"^  --(?:\[no\])?(\w+)(?:=\S*)?$", out, re.MULTILINE)
    assert shown == [flag for flag in values if flag != "override"]
    assert ("docs/config_reference.md" in out) == ("override" in values)
    # No word of the library that parses flags is left.
    assert not re.search(r"absl|flagfile|repeat this option|moe_jax\.cli|None", out)


def test_the_log_has_the_verbosity_of_the_flag(moe_jax, tmp_path):
    code, _, err = moe_jax("report", str(tmp_path))
    assert code == 2 and "holds no run" in err and logging.get_verbosity() == logging.WARNING
    # With the messages of debugging, a mistake of the user has its traceback.
    with pytest.raises(FileNotFoundError, match="holds no run"):
        moe_jax("report", str(tmp_path), "--verbosity=1")
    assert logging.level_debug()
    flags.FLAGS["verbosity"].present = 0


def test_a_flag_shows_values_default_and_need(moe_jax):
    out = moe_jax("sweep", "--help")[1]
    assert "--sampler=grid|random|tpe|cmaes\n" in out and "(default 'grid')" in out
    assert "Folder of the run. (required)" in out
    assert "(may be repeated)" in out


NEW = "--workdir=new"
# Arguments, and what the one line must say.
MISTAKES = {
    "no such command": (["trian"], ["'trian' is not a command", "did you mean 'train'"]),
    "no folder": (["train", "quickstart"], ["--workdir is missing: add --workdir=VALUE"]),
    "no config": (["train", NEW], ["--config is missing; try --config=quickstart"]),
    "no such config": (["train", "mixtral_8x7", NEW], ["did you mean 'mixtral_8x7b'"]),
    "no such ablation": (["ablate", "switch/capacity"], ["did you mean 'switch/capacity_factor'"]),
    "setting as flag": (
        ["train", "quickstart", NEW, "--steps=10"],
        ["moe-jax train has no flag --steps; the setting is --config.training.steps"],
    ),
    "setting without config": (
        ["train", "quickstart", NEW, "--training.steps=10"],
        ["has no flag --training.steps; the setting is --config.training.steps"],
    ),
    "setting without dashes": (
        ["train", "quickstart", NEW, "training.steps=10"],
        ["unexpected argument 'training.steps=10'; settings start with --config."],
    ),
    "misspelt flag": (
        ["train", "quickstart", "--wrokdir=x"],
        ["has no flag --wrokdir; did you mean '--workdir'"],
    ),
    "words for a number": (
        ["train", "quickstart", NEW, "--config.training.steps=ten"],
        ["--config.training.steps=ten: 'ten' is not a whole number"],
    ),
    "words for a rate": (
        ["train", "quickstart", NEW, "--config.optimizer.learning_rate=fast"],
        ["--config.optimizer.learning_rate=fast: 'fast' is not a number"],
    ),
    "words for a switch": (
        ["train", "quickstart", NEW, "--config.model.gated=perhaps"],
        ["--config.model.gated=perhaps: 'perhaps' is not True or False"],
    ),
    "no value": (
        ["train", "quickstart", NEW, "--config.training.steps"],
        ["Missing value for flag --config.training.steps: add =VALUE"],
    ),
    "flag of another command": (["compare", NEW], ["moe-jax compare has no flag --workdir"]),
    "words for a count": (
        ["generate", "runs/q", "--tokens=many"],
        ["'many' is not a whole number"],
    ),
    "no run": (["evaluate", "nowhere"], ["nowhere holds no run", "train one there first"]),
    "no run to report": (["report", "nowhere"], ["nowhere holds no run"]),
    "no model": (["score", "nowhere", "--file=README.md"], ["nowhere holds no run, no converted"]),
    "no such sampler": (
        ["sweep", "quickstart", NEW, "--over=seed=0,1", "--sampler=bayes"],
        ["--sampler=bayes: the value is not one of grid|random|tpe|cmaes"],
    ),
    "one mesh of all": (
        ["plan", "quickstart", "--topology=cpu:8", "--sweep", "--mesh=data=8"],
        ["--sweep compares all meshes: omit it or --mesh"],
    ),
    "steps of another run": (
        ["lr_range", "--config=quickstart", NEW, "--config.training.steps=9"],
        ["--steps is the number of steps of the test: leave out --config.training.steps"],
    ),
    "nothing to sweep": (["sweep", "quickstart", NEW], ["try --over seed=0..3"]),
    "folder as source": (
        ["train", "quickstart", NEW, "--config.data.source=docs"],
        ["data.source 'docs'", "'docs' is a folder: use files:docs/**/*.txt"],
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_next_step(moe_jax, tmp_path, monkeypatch, case):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").touch()
    monkeypatch.chdir(tmp_path)
    arguments, parts = MISTAKES[case]
    code, out, err = moe_jax(*arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    # Neither the words of a parser nor a new folder are left.
    assert not re.search(r"base 10|could not convert|command line flag|other than None", line)
    assert not (tmp_path / "new").exists()


def test_a_module_is_the_command():
    done = command("moe_jax")
    assert done.returncode == 0 and done.stdout.startswith("usage: moe-jax COMMAND")


def test_make_shows_its_targets():
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    shown = re.findall(r"^\t@echo 'make (\w+) ", text, re.MULTILINE)
    assert {*shown} == {*phony.split()} - {"help", "python-version"}
    assert ".DEFAULT_GOAL := help" in text
