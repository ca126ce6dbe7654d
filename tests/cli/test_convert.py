"""What the command that converts refuses, and how it ends."""

import signal

import pytest
from absl import flags

from moe_jax import signals
from moe_jax.cli import convert
from moe_jax.errors import ConfigError
from moe_jax.interop import native
from moe_jax.interop.huggingface import load
from tests.parity.compare_models import recorded


@pytest.fixture
def run():
    """A function that runs the command with these flags in this process."""

    def command(start, source, output, family=None):
        values = flags.FlagValues()
        convert.define(values)
        named = {"from": start, "input": source, "output": output, "family": family}
        values(["convert", *(f"--{name}={value}" for name, value in named.items() if value)])
        convert.main(values)

    return command


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One folder of each kind."""
    top = tmp_path_factory.mktemp("sources")
    for name in ("hf", "run", "empty", "foreign", "bare"):
        (top / name).mkdir()
    recorded("mixtral", top / "hf")
    native.save(load(top / "hf"), top / "native")
    (top / "run" / "config.json").write_text('{"config": {"name": "x"}}')
    (top / "foreign" / "config.json").write_text('{"name": "other"}')
    (top / "bare" / "config.json").write_text((top / "hf" / "config.json").read_text())
    return top


@pytest.mark.parametrize(
    ("start", "source", "match"),
    [
        ("hf", "nowhere", "nowhere is not a folder"),
        ("hf", "empty", "holds no released model, no converted model and no run"),
        ("hf", "native", "is a converted model: use --from=moe_jax"),
        ("hf", "run", "is a run: use --from=moe_jax"),
        ("hf", "foreign", "model_type='' is unknown"),
        ("hf", "bare", "has neither model.safetensors nor"),
        ("moe_jax", "hf", "is a released model: use --from=hf"),
        ("moe_jax", "empty", "holds no released model, no converted model and no run"),
        ("moe_jax", "run", "holds no checkpoint yet: train first"),
    ],
)
def test_a_folder_that_cannot_be_converted_is_one_line(
    run, sources, tmp_path, start, source, match
):
    with pytest.raises(ConfigError, match=match) as error:
        run(start, sources / source, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_output_is_looked_at_before_the_input_is_read(run, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "load", None)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file, not a folder: give another --output"):
        run("hf", sources / "hf", tmp_path / "file")
    with pytest.raises(ConfigError, match="is not empty: give another --output"):
        run("hf", sources / "hf", tmp_path)


def test_a_family_that_does_not_fit_is_one_line(run, sources, tmp_path):
    with pytest.raises(ConfigError, match="qwen3_moe cannot express layers.0.attention"):
        run("moe_jax", sources / "native", tmp_path / "out", "qwen3_moe")
    with pytest.raises(ConfigError, match="--family has an effect only with --from=moe_jax"):
        run("hf", sources / "hf", tmp_path / "out", "mixtral")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_no_folder(run, sources, tmp_path, monkeypatch, number):
    def stopped(*_, **__):
        raise signals.Interrupted(number)

    monkeypatch.setattr("moe_jax.interop.huggingface.files.save_file", stopped)
    with pytest.raises(signals.Interrupted):
        run("moe_jax", sources / "native", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
