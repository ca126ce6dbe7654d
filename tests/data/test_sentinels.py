"""Bytes with three sentinels: 259 ids of text, then <extra_id_2>, <extra_id_1>, <extra_id_0>."""

import numpy as np
import pytest

from moe_jax.data import Bytes, DataConfig, Spans, WithSentinels, load_tokenizer, open_tokenizer

TOKENIZER = WithSentinels(Bytes(), 3)
A, B = (ord(letter) + 3 for letter in "ab")


def test_sentinels_lie_above_the_text():
    assert TOKENIZER.vocab_size == len(TOKENIZER.byte_lengths) == 262
    assert (TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id) == (0, 1, 2)
    assert [TOKENIZER.piece(token) for token in (261, 260, 259, A)] == [
        "<extra_id_0>",
        "<extra_id_1>",
        "<extra_id_2>",
        "a",
    ]
    assert TOKENIZER.byte_lengths[[A, 259, 260, 261]].tolist() == [1, 0, 0, 0]


def test_a_text_never_becomes_a_sentinel():
    assert TOKENIZER.encode("<extra_id_0>").tolist() == Bytes().encode("<extra_id_0>").tolist()


def test_blanks_become_sentinels_and_are_shown():
    ids = TOKENIZER.encode_blanks("a<extra_id_0>b<extra_id_2>")
    assert ids.dtype == np.int32
    assert ids.tolist() == [A, 261, B, 259]
    assert TOKENIZER.decode(ids) == "a<extra_id_0>b<extra_id_2>"
    assert TOKENIZER.decode(np.array([261, 260, A, 2, 0])) == "<extra_id_0><extra_id_1>a"
    assert TOKENIZER.decode(np.array([A, B])) == "ab"


def test_a_blank_without_a_sentinel_is_refused():
    with pytest.raises(ValueError, match="no <extra_id_3>: the last of 3 sentinels"):
        TOKENIZER.encode_blanks("a<extra_id_3>")


def test_saved_and_loaded(tmp_path):
    TOKENIZER.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.vocab_size == 262
    assert loaded.piece(261) == "<extra_id_0>"


def test_opened_where_spans_are_cut_out():
    config = DataConfig(tokenizer="bytes", target_length=64, spans=Spans(sentinels=50))
    assert open_tokenizer(config).vocab_size == 309
