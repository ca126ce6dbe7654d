"""A masked language model from the command lines: trained on eight devices, resumed, evaluated."""

import json

import pytest

from tests.system import runs

DEVICES = 8


@pytest.fixture(scope="module")
def flags(source):
    mesh = ("--config.mesh.data=4", "--config.mesh.expert=2")
    return ("--config=tests/system/tiny_masked.py", source, *mesh)


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked") / "run"
    runs.train(folder, *flags, devices=DEVICES)
    return folder


def test_a_killed_run_ends_as_if_it_had_not_been(flags, whole, tmp_path):
    runs.kill_and_resume(tmp_path / "run", whole, *flags, devices=DEVICES)


def test_it_is_evaluated_and_generates_nothing(whole):
    done = runs.command("moe_jax.evaluate", f"--workdir={whole}")
    result = json.loads((whole / "result.json").read_text())
    assert json.loads(done.stdout)["loss"] == pytest.approx(result["loss"], rel=1e-5)
    # Masked tokens cannot be compared with models of whole texts.
    assert result["baselines"] == {}
    refused = runs.command("moe_jax.generate", f"--workdir={whole}", "--prompt=def ")
    assert "generates no text" in runs.error_line(refused)
