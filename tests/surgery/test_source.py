"""Texts that a change reads: pairs of an encoder-decoder, and released models of two stacks."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from moe_jax import models, routing
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import load, save
from moe_jax.nn.positions import Learned
from moe_jax.surgery import source
from moe_jax.surgery.api import merge, prune
from moe_jax.surgery.source import open_source
from tests.parity.compare_models import recorded
from tests.surgery.small import config
from tests.surgery.test_quantising import add_tokenizer

TEXT = "experts and routers of a mixture of experts " * 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Switch of five experts per layer, with a tokenizer, beside a text."""
    path = tmp_path_factory.mktemp("released")
    (path / "hf").mkdir()
    recorded("switch_transformers", path / "hf")
    add_tokenizer(path / "hf")
    (path / "text.txt").write_text(TEXT)
    return path


def test_an_encoder_decoder_reads_the_halves_of_each_part(folder):
    opened = open_source(folder / "hf")
    (batch,) = opened.batches(4, str(folder / "text.txt"))
    ids, end = opened.tokenizer().encode(TEXT), opened.tokenizer().eos_id
    parts = [ids[start : start + 255] for start in range(0, len(ids), 255)]
    assert len(parts) > 1
    for row, part in enumerate(parts):
        half = (len(part) + 1) // 2
        target, source = [*part[half:], end], [*part[:half], end]
        assert batch["inputs"][row, : len(target)].tolist() == [0, *target[:-1]]
        assert batch["targets"][row, : len(target)].tolist() == target
        assert batch["encoder_inputs"][row, : len(source)].tolist() == source
        assert batch["segments"][row].sum() == len(target)
        assert batch["encoder_segments"][row].sum() == len(source)
    assert not batch["segments"][len(parts) :].any()


@pytest.mark.parametrize("by", ["load", "loss"])
def test_a_released_encoder_decoder_is_pruned_by_a_text(folder, tmp_path, by):
    text = str(folder / "text.txt")
    prune(
        folder / "hf", tmp_path / "out", experts=3, by=by, file=text, family="switch_transformers"
    )
    before, after = load(folder / "hf"), load(tmp_path / "out")
    sizes = [layer.moe.num_experts for layer in after.config.sparse_layers()]
    assert sizes == [3] * len(before.config.sparse_layers())


def test_modules_that_look_ahead_are_left_out_of_a_released_model(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    (tmp_path / "hf").mkdir()
    recorded("glm4_moe", tmp_path / "hf")
    config = dataclasses.replace(load(tmp_path / "hf").config, lookahead=1)
    save(models.make(config, 43, jax.random.key(0)), tmp_path / "ahead", "glm4_moe")
    add_tokenizer(tmp_path / "ahead")
    settings = {"experts": 3, "by": "output", "file": str(text), "family": "glm4_moe"}
    with pytest.raises(ConfigError, match="leave the modules of a trained model out") as error:
        prune(tmp_path / "ahead", tmp_path / "out", **settings)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    prune(tmp_path / "ahead", tmp_path / "out", **settings, drop_lookahead=True)
    found = load(tmp_path / "out").config
    assert found.lookahead == 0 and load(tmp_path / "ahead").config.lookahead == 1
    assert {layer.moe.num_experts for layer in found.sparse_layers()} == {3}


def test_a_released_encoder_decoder_is_merged_by_a_text(folder, tmp_path):
    text = str(folder / "text.txt")
    merge(folder / "hf", tmp_path / "out", experts=2, file=text)
    merged = load(tmp_path / "out").config.sparse_layers()
    assert {layer.moe.num_experts for layer in merged} == {2}


def test_the_parts_of_a_blend_are_read_in_turn(monkeypatch):
    batches = {"code": [1, 2, 3], "prose": [10]}
    monkeypatch.setattr(source.data, "eval_batches", lambda part, tokenizer: batches[part])
    parts = types.SimpleNamespace(parts={"code": "code", "prose": "prose"})
    run = types.SimpleNamespace(experiment=types.SimpleNamespace(data=parts), tokenizer=None)
    assert list(source.OpenedModel._validation(run)) == [1, 10, 2, 3]


def test_a_text_is_cut_where_learned_positions_end(folder):
    model = config(routing.preset("mixtral"), positions=Learned(5))
    opened = dataclasses.replace(
        open_source(folder / "hf"), weights=types.SimpleNamespace(model=model)
    )
    batch = next(opened.batches(1, str(folder / "text.txt")))
    assert batch["inputs"].shape == (8, 5) and batch["positions"].max() == 4
    # The first token of a row is predicted by the last one of the row before.
    np.testing.assert_array_equal(batch["inputs"][1:, 0], batch["targets"][:-1, -1])
