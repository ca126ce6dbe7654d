"""Explanations of folders: every family of transformers, texts, and one-line errors."""

import jax
import numpy as np
import pytest

from moe_jax import models
from moe_jax.cli import main
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import FAMILIES, save
from moe_jax.run.explaining import explain
from tests.data.test_hf_tokenizer import byte_level
from tests.parity import compare_models as compare
from tests.test_face import TINY_MIXTRAL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Mixtral with a byte-level tokenizer, and positions for a window of 1024."""
    path = tmp_path_factory.mktemp("explained") / "model"
    config = {**TINY_MIXTRAL, "vocab_size": 300}
    save(
        models.make(FAMILIES["mixtral"].read(config), 300, jax.random.key(0)),
        path,
        "mixtral",
        original=config,
    )
    byte_level(path)
    return path


def test_the_command_explains_a_text_and_leaves_the_folder_as_it_is(
    folder, tmp_path, monkeypatch, capsys
):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    output = tmp_path / "page.html"
    monkeypatch.setattr(
        "sys.argv", ["moe-jax", "explain", str(folder), "--prompt=a b", f"--output={output}"]
    )
    main.main()
    out = capsys.readouterr().out
    assert output.is_file() and output.with_suffix(".json").is_file()
    assert out.splitlines()[-2:] == [str(output), str(output.with_suffix(".json"))]
    assert out.count("effect") >= 2 * 3 and "next" in out
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


MISTAKES = {
    "empty": ([], {}, "the text is empty"),
    "long": ([1] * 1025, {}, "1025 tokens, and an explanation has at most 1024"),
    "unknown": ([300], {}, "token id 300 is not below 300"),
    "target": ([1], {"target": [2]}, "has no target"),
    "step": ([1], {"step": 3}, "--step selects a checkpoint of a run"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(folder, name):
    prompt, more, reason = MISTAKES[name]
    with pytest.raises(ConfigError, match=reason) as error:
        explain(folder, prompt, **more)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        explain(tmp_path, "a")


@pytest.mark.parametrize("case", compare.MIXTURES)
def test_every_family_is_explained(case, tmp_path):
    compare.recorded(case, tmp_path)
    found = explain(tmp_path, [3, 1, 4])
    assert found.layers and len(found.log_likelihoods) == len(found.pieces)
    for layer in found.layers:
        assert layer.error < 1e-5
        assert np.abs(layer.effects[layer.experts >= 0]).max() > 0
        assert len(layer.experts) == len(found.source if layer.of_source else found.pieces)
