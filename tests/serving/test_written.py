"""Texts of answers, part by part."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_jax import data
from moe_jax.serving.request import Ended, Token
from moe_jax.serving.written import AnswerWriter, Detokenizer, Stops
from tests.data.test_hf_tokenizer import byte_level, opened

BYTES = data.Bytes()
IDS = st.lists(st.integers(0, 258), max_size=24)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return opened(byte_level(tmp_path_factory.mktemp("hf") / "hf"))


@pytest.fixture(scope="module")
def sentencepiece():
    return data.train_sentencepiece(["def f(x):\n    return x\n", "é 😀 ▁ a\n"], 300)


def parts(tokenizer, ids):
    writer = Detokenizer(tokenizer)
    return [*map(writer.push, ids), writer.rest()]


def test_a_character_comes_with_its_last_byte():
    # é is 2 bytes and 😀 is 4.
    found = parts(BYTES, BYTES.encode("aé😀b").tolist())
    assert found == ["a", "", "é", "", "", "", "😀", "b", ""]


def test_a_byte_that_ends_no_character_becomes_a_replacement():
    # 0xC3 begins é, and is followed by "a"; 0xE2 0x82 begin the euro sign, and nothing follows.
    assert parts(BYTES, [0xC3 + 3, ord("a") + 3]) == ["", "\ufffda", ""]
    assert parts(BYTES, [ord("a") + 3, 0xE2 + 3, 0x82 + 3]) == ["a", "", "", "\ufffd"]


@given(ids=IDS)
@settings(max_examples=50, deadline=None)
@example(ids=[0xF0 + 3, 0x9F + 3, 0xFF + 3, 0x98 + 3, 5])
def test_the_parts_of_any_bytes_are_their_text(ids):
    assert "".join(parts(BYTES, ids)) == BYTES.decode(np.array(ids, np.int32))


@given(text=st.text(max_size=12))
@settings(max_examples=15, deadline=None)
@example(text=" a  é 😀\n▁\ue000\ue001")
def test_the_parts_of_tokenizers_are_the_text(released, sentencepiece, text):
    for tokenizer in (BYTES, released, sentencepiece):
        ids = tokenizer.encode(text).tolist()
        assert "".join(parts(tokenizer, ids)) == tokenizer.decode(np.array(ids, np.int32)) == text


def test_a_space_before_a_word_stays(tmp_path):
    # Metaspace drops the space before the first word of what it decodes.
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    pieces = ["<unk>", "<s>", "</s>", "\u2581a", "\u2581b", "c"]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, []))
    inner.decoder = tokenizers.decoders.Metaspace()
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    found = parts(opened(f"hf:{tmp_path}"), [3, 4, 1, 3, 5])
    assert found == ["a", " b", "", " a", "c", ""]


LETTERS = st.text("ab", max_size=6)


@given(texts=st.lists(LETTERS, max_size=5), stops=st.lists(st.text("ab", min_size=1, max_size=4)))
@settings(max_examples=100, deadline=None)
@example(texts=["a", "ab", "aab"], stops=["aab"])
def test_a_text_ends_before_the_first_stop(texts, stops):
    search, shown, stopped = Stops(stops), "", False
    for text in texts:
        part, stopped = search.push(text)
        shown += part
        if stopped:
            break
    whole = "".join(texts)
    ends = [len(whole[:end]) for end in range(len(whole) + 1) if whole[:end].endswith((*stops,))]
    assert stopped == bool(ends and stops)
    if stopped:
        assert whole.startswith(shown) and not any(stop in shown for stop in stops)
        assert any(whole[len(shown) :].startswith(stop) for stop in stops)
    else:
        assert shown + search.rest() == whole


def test_an_answer_ends_before_a_stop_that_several_tokens_write():
    writer = AnswerWriter(BYTES, ["END"])
    found = [writer.push(Token(1, int(i), -1.0)) for i in BYTES.encode("aENbEND")]
    assert [part.text for part in found] == ["a", "", "", "ENb", "", "", ""]
    assert [part.reason for part in found] == [None] * 6 + ["stop"]
    assert [part.offsets for part in found] == [(i,) for i in range(7)]


def test_the_end_token_is_no_part_and_what_was_held_is():
    writer = AnswerWriter(BYTES, ["END"])
    assert writer.push(Token(1, ord("E") + 3, -1.0)).text == ""
    last = writer.push(Token(1, BYTES.eos_id, -1.0, ended=Ended.END))
    assert (last.text, last.tokens, last.reason) == ("E", (), "stop")


def test_a_length_ends_in_the_middle_of_a_character():
    writer = AnswerWriter(BYTES, [])
    last = writer.push(Token(1, 0xC3 + 3, -1.0, ended=Ended.LENGTH))
    assert (last.text, len(last.tokens), last.reason) == ("\ufffd", 1, "length")
