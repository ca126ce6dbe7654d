"""An encoder-decoder from the command lines: trained on eight devices, killed, resumed, used."""

import json

import pytest

from tests.system import runs

DEVICES = 8


@pytest.fixture(scope="module")
def flags(source):
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.expert=2")
    return ("--config=tests/system/tiny_spans.py", source, *mesh)


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spans") / "run"
    runs.train(folder, *flags, devices=DEVICES)
    return folder


def test_killed_run_ends_as_if_it_had_not_been(flags, whole, tmp_path):
    runs.kill_and_resume(tmp_path / "run", whole, *flags, devices=DEVICES)


def test_evaluate_and_report_name_both_stacks(whole):
    done = runs.command("moe_jax.evaluate", f"--workdir={whole}")
    found = json.loads(done.stdout)
    result = json.loads((whole / "result.json").read_text())
    assert found["loss"] == pytest.approx(result["loss"], rel=1e-5)
    assert [layer["layer"] for layer in found["layers"]] == ["encoder 1", "decoder 1"]
    # What is cut out of a text cannot be compared with models of whole texts.
    assert result["baselines"] == {}
    assert result["tokens"] == 30 * 8 * (32 + 16)
    tokens = json.loads((whole / "expert_tokens.json").read_text())["layers"]
    assert [layer["layer"] for layer in tokens] == ["encoder 1", "decoder 1"]
    pieces = {row["piece"] for layer in tokens for expert in layer["experts"] for row in expert}
    assert "<extra_id_0>" in pieces
    assert "Layer decoder 1" in (whole / "report.html").read_text()


def test_generate_fills_in_blanks(whole):
    prompt = "--prompt=for i <extra_id_0> range"
    arguments = (f"--workdir={whole}", "--tokens=8", "--temperature=0")
    done = runs.command("moe_jax.generate", *arguments, prompt)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip("\n")
    again = runs.command("moe_jax.generate", *arguments, prompt, "--samples=2")
    assert again.stdout == 2 * done.stdout
    wrong = runs.command("moe_jax.generate", *arguments, "--prompt=<extra_id_100>")
    assert "there is no <extra_id_100>" in runs.error_line(wrong)


def test_a_decoder_cannot_read_spans(source, tmp_path):
    arguments = ("--config=tests/system/tiny.py", source, "--config.data.spans.sentinels=100")
    flags = (f"--workdir={tmp_path / 'run'}", *arguments, "--config.data.target_length=16")
    done = runs.command("moe_jax.train", *flags)
    assert "a decoder alone reads whole texts: unset data.spans" in runs.error_line(done)
    assert not (tmp_path / "run").exists()
