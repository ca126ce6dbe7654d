"""Every flag of the commands that write a changed model is an argument of its function."""

import importlib

import pytest
from absl import flags

from moe_jax.config.loading import experiment_of
from moe_jax.run import workdir

FOLDERS = {
    "output": "out",
    "step": 3,
    "family": "mixtral",
    "overrides": {"training.steps": 7},
}
FOLDER_FLAGS = ("--output=out", "--step=3", "--family=mixtral", "--override=training.steps=7")
TEXT = {"file": "text.txt", "batches": 2}
AHEAD = {"drop_lookahead": True}
TEXT_FLAGS = ("--file=text.txt", "--batches=2")
# For each command: its other flags, none at its default, and the arguments of its function.
COMMANDS = {
    "upcycle": (
        "--layers=1,3 --experts=6 --k=3 --shards=2 --redrawn=0.5 --router=kimi_k2 --seed=4",
        {
            **{"layers": [1, 3], "experts": 6, "k": 3, "shards": 2},
            **{"redrawn": 0.5, "router": "kimi_k2", "seed": 4},
        },
    ),
    "prune": (
        "--experts=3 --by=output --across --optimizer=keep --drop_lookahead",
        {**TEXT, **AHEAD, "experts": 3, "by": "output", "across": True, "optimizer": "keep"},
    ),
    "merge": (
        "--experts=3 --across --redirect --optimizer=keep --drop_lookahead",
        {**TEXT, **AHEAD, "experts": 3, "across": True, "redirect": True, "optimizer": "keep"},
    ),
    "distil": (
        "--experts=2 --student=mixture --start=prune --weight=0.25 --temperature=2 --routing=0.1 "
        "--drop_lookahead",
        {
            **{**TEXT, **AHEAD, "experts": 2, "student": "mixture", "start": "prune"},
            **{"weight": 0.25, "temperature": 2.0, "routing": 0.1},
        },
    ),
    "merge_adapters": ("", {}),
    "grow": (
        "--copies=2 --parts=3 --hidden=40 --copy=0,3 --layers=1 --noise=0.1 --seed=4 "
        "--optimizer=keep --drop_lookahead",
        {
            **AHEAD,
            **{"copies": 2, "parts": 3, "hidden": 40, "copy": [0, 3], "layers": [1]},
            **{"noise": 0.1, "seed": 4, "optimizer": "keep"},
        },
    ),
    "take_experts": (
        "--other=runs/b --other_step=5 --experts=2,3 --layers=1 --router --optimizer=keep",
        {
            **{"other": "runs/b", "other_step": 5, "experts": [2, 3], "layers": [1]},
            **{"router": True, "optimizer": "keep"},
        },
    ),
    "quantise": (
        "--bits=int4 --group=32 --calibration=validation --budget=4000",
        {**TEXT, "bits": "int4", "group": 32, "calibration": "validation", "budget": 4000},
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_an_argument(name, tmp_path, monkeypatch, capsys):
    workdir.claim(tmp_path / "run", experiment_of("quickstart"))
    given, expected = COMMANDS[name]
    command, values = importlib.import_module(f"moe_jax.cli.{name}"), flags.FlagValues()
    command.define(values)
    text = TEXT_FLAGS if "file" in expected else ()
    values([name, f"--input={tmp_path / 'run'}", *FOLDER_FLAGS, *text, *given.split()])
    assert [flag for flag in values if values[flag].value == values[flag].default] == []
    calls = []

    def called(**arguments):
        calls.append(arguments)
        return "a changed model"

    monkeypatch.setattr(command, name, called)
    command.main(values)
    assert calls == [{"source": tmp_path / "run", **FOLDERS, **expected}]
    assert capsys.readouterr().out == "a changed model\n"
