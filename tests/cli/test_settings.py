"""``moe-jax settings``: every setting with its value, range and meaning."""

import dataclasses

import pytest

from moe_jax.cli import main
from moe_jax.config.experiment import Experiment
from moe_jax.config.optimizer import Muon, OptimizerConfig
from moe_jax.config.reference import settings_of


def printed(capsys, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["moe-jax", "settings", *arguments])
    try:
        main.main()
    except SystemExit as stop:
        assert stop.code in (0, 2)
    return capsys.readouterr()


def test_every_setting_is_named_once_and_has_a_meaning():
    found = settings_of(Experiment("x"))
    names = [setting.name for setting in found]
    assert len(names) == len(set(names)) > 100
    assert not [setting.name for setting in found if not setting.meaning and setting.name != "name"]


def test_the_chosen_class_decides_the_settings():
    run = dataclasses.replace(Experiment("x"), optimizer=OptimizerConfig(Muon(rms=0.3)))
    by_name = {setting.name: setting for setting in settings_of(run)}
    assert by_name["optimizer.rule.type"].value == "Muon"
    assert by_name["optimizer.rule.type"].kind == "one of Adafactor, AdamW, Lion, Muon, SGD"
    rms = by_name["optimizer.rule.rms"]
    assert (rms.value, rms.kind, rms.default) == (0.3, "number > 0", "`0.2`")
    assert "optimizer.rule.clipping_threshold" not in by_name


def test_a_word_selects_settings_of_a_config(capsys, monkeypatch):
    out, _ = printed(capsys, monkeypatch, "quickstart", "--word=Warmup")
    first, second, *rest = out.splitlines()
    assert first == "optimizer.warmup_steps=50"
    assert second.startswith("    integer ≥ 0; default 100. Number of steps in which")
    assert not [line for line in rest if not line.startswith("    ")]


def test_overrides_show(capsys, monkeypatch):
    override = ("--word=clip_norm", "--config.optimizer.clip_norm=0.5")
    out, _ = printed(capsys, monkeypatch, "quickstart", *override)
    assert out.startswith("optimizer.clip_norm=0.5\n")
    out, err = printed(capsys, monkeypatch, *override)
    assert out == "" and "--config is missing" in err


@pytest.mark.parametrize("arguments", [["--word=zzz"], ["quickstart", "--word=zzz"]])
def test_an_unknown_word_is_one_line(capsys, monkeypatch, arguments):
    out, err = printed(capsys, monkeypatch, *arguments)
    assert out == ""
    assert err.strip().startswith("error: no setting has --word='zzz'")
    assert len(err.strip().splitlines()) == 1
