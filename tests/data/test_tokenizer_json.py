"""Tokenizers of this package as ``tokenizer.json``: the library reads the same ids and texts."""

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_jax import data
from moe_jax.data.tokenizer_json import tokenizer_files

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

TRICKY = "\n\t \0\u2581\ue000\ue001\u00a0enu<>s0x\U0001f600é"
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.text(st.sampled_from(TRICKY))


@pytest.fixture(scope="module")
def own(library):
    return {
        name: data.open_tokenizer(given)
        for name, given in (("bytes", data.DataConfig(tokenizer="bytes")), ("pieces", library))
    }


@pytest.fixture(scope="module")
def theirs(own):
    texts = {name: tokenizer_files(tokenizer)["tokenizer.json"] for name, tokenizer in own.items()}
    return {name: tokenizers.Tokenizer.from_str(text) for name, text in texts.items()}


@pytest.mark.parametrize("name", ["bytes", "pieces"])
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_ids_and_texts_are_the_same(own, theirs, name, text):
    # The library reads a special token that is written in the text as this token.
    assume(not any(piece in text for piece in ("<pad>", "<s>", "</s>", "<unk>")))
    ids = theirs[name].encode(text).ids
    # A document of a run starts with the begin token, 1.
    assert ids == [1, *own[name].encode(text).tolist()]
    assert theirs[name].decode(ids) == text


def test_bytes_by_hand(theirs):
    # Byte 0x61 has the id 0x61 + 3, and "é" is the two bytes 0xC3 and 0xA9.
    assert theirs["bytes"].encode("aé</s>").ids == [1, 0x64, 0xC6, 0xAC, 2]


def test_merges_follow_the_scores(own, theirs, library):
    # A long text has many merges that compete for the same characters.
    text = data.open_source(library, "train")[0][:5000]
    assert theirs["pieces"].encode(text).ids[1:] == own["pieces"].encode(text).tolist()


def test_a_run_of_the_files_counts_the_same_bytes(own, tmp_path):
    for name, tokenizer in own.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, text in tokenizer_files(tokenizer).items():
            (folder / file).write_text(text, encoding="utf-8")
        opened = data.open_tokenizer(data.DataConfig(tokenizer=f"hf:{folder}"))
        assert (opened.pad_id, opened.bos_id, opened.eos_id) == (0, 1, 2)
        ids = tokenizer.encode("two\nlines, é\n")
        np.testing.assert_array_equal(opened.encode("two\nlines, é\n"), ids)
        np.testing.assert_array_equal(opened.byte_lengths[ids], tokenizer.byte_lengths[ids])


def test_sentinels_are_special_tokens():
    blanked = data.WithSentinels(data.Bytes(), 2)
    inner = tokenizers.Tokenizer.from_str(tokenizer_files(blanked)["tokenizer.json"])
    # The first sentinel has the highest of 259 + 2 ids.
    assert inner.encode("<extra_id_0>a<extra_id_1>").ids == [1, 260, 0x64, 259]


def test_a_released_tokenizer_has_files_of_its_own(own, tmp_path):
    for file, text in tokenizer_files(own["bytes"]).items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    released = data.open_tokenizer(data.DataConfig(tokenizer=f"hf:{tmp_path}"))
    assert tokenizer_files(released) == {}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
