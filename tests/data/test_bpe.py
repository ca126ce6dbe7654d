"""A byte-level BPE of one's own."""

import numpy as np
import pytest

from moe_jax.data import DataConfig, open_source, open_tokenizer, train_bpe
from moe_jax.errors import ConfigError

from .corpora import write_corpus

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")


@pytest.fixture
def source(tmp_path):
    (tmp_path / "text").mkdir()
    name = write_corpus(tmp_path / "text", ["low low low lower"] * 5, ["x"])
    return open_source(DataConfig(source=name), "train")


def test_frequent_words_become_tokens(source, tmp_path):
    train_bpe(source, 265, tmp_path / "bpe")
    tokenizer = open_tokenizer(DataConfig(tokenizer=f"hf:{tmp_path}/bpe"))
    # 3 specials, 256 bytes and 5 merges: lo, low, " low", er and " lower"; no pair is left.
    assert tokenizer.vocab_size == 264
    ids = tokenizer.encode("low low")
    assert [tokenizer.piece(i) for i in ids] == ["low", " low"]
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)


def test_every_text_comes_back(source, tmp_path):
    train_bpe(source, 259, tmp_path / "bpe")
    tokenizer = open_tokenizer(DataConfig(tokenizer=f"hf:{tmp_path}/bpe"))
    text = " é\t\r\n\U0001f600 <s> low"
    ids = tokenizer.encode(text.replace("<s>", "< s>"))
    assert tokenizer.decode(ids) == text.replace("<s>", "< s>")
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode()) + 1


def test_training_is_the_same_each_time(source, tmp_path):
    for name in "ab":
        train_bpe(source, 262, tmp_path / name)
    one, other = ((tmp_path / name / "tokenizer.json").read_text() for name in "ab")
    assert one == other


def test_transformers_reads_the_folder(source, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    train_bpe(source, 262, tmp_path / "bpe")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "bpe")
    ours = open_tokenizer(DataConfig(tokenizer=f"hf:{tmp_path}/bpe"))
    np.testing.assert_array_equal(theirs.encode("low é"), ours.encode("low é"))
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)


def test_errors_say_what_to_change(source, tmp_path):
    with pytest.raises(ConfigError, match="data.vocab_size=258 is too small: .* need 259"):
        train_bpe(source, 258, tmp_path / "bpe")
    train_bpe(source, 259, tmp_path / "bpe")
    with pytest.raises(ConfigError, match="tokenizer.json exists: delete it"):
        train_bpe(source, 259, tmp_path / "bpe")
