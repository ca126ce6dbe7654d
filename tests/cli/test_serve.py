"""Mistakes in the flags of ``moe-jax serve``."""

import importlib.util

import pytest
from absl import flags

from moe_jax.cli import serve
from moe_jax.errors import ConfigError


def run(tmp_path, **changed):
    """Runs the command on a folder without a model."""
    values = flags.FlagValues()
    serve.define(values)
    given = {"model": str(tmp_path), **changed}
    values(["serve", *(f"--{name}={value}" for name, value in given.items())])
    serve.main(values)


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"starlette: pip install 'moe_jax\[serve\]'"):
        run(tmp_path)


def test_serving_reads_no_setting_but_the_alarms(tmp_path):
    pytest.importorskip("starlette", reason="pip install 'moe_jax[serve]'")
    with pytest.raises(ConfigError, match=r"model\.width has no effect on serving, which reads"):
        run(tmp_path, override="model.width=8")
    alarms = '({"type": "Drift", "above": 2.0},)'
    with pytest.raises(ConfigError, match="above"):
        run(tmp_path, override=f"training.alarms={alarms}")


def test_a_key_is_in_a_file(tmp_path):
    pytest.importorskip("starlette", reason="pip install 'moe_jax[serve]'")
    (tmp_path / "key").write_text(" \n")
    with pytest.raises(ConfigError, match="key is empty: write the key into it"):
        run(tmp_path, api_key_file=tmp_path / "key")
    (tmp_path / "key").write_text("secret\n")
    with pytest.raises(ConfigError, match="holds no run, no converted model"):
        run(tmp_path, api_key_file=tmp_path / "key")
