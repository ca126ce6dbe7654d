import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import Bytes, DataConfig, MixtureConfig, rows, train_batches
from moe_jax.errors import ConfigError

from .corpora import write_corpus

EOS, BOS = 2, 1


class Texts:
    """Documents in memory; the domain of a document is its number."""

    identity, size = "texts", 0

    def __init__(self, *texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return self.texts[index]

    def domain(self, index):
        return index


def corpus_of(*texts):
    tokens = np.concatenate([np.append(Bytes().encode(text), EOS) for text in texts])
    return rows.Corpus(tokens.astype(np.uint16), Texts(*texts), Bytes())


def test_packed_rows_by_hand():
    # Tokens of "ab" are 100 101 EOS, of "" EOS, of "c" 102 EOS; laid in the order 2 0 1: 6 tokens.
    packed = rows.PackedRows(corpus_of("ab", "", "c"), np.array([2, 0, 1]), 4)
    assert len(packed) == 2
    expected = [
        ([102, EOS, 100, 101], [BOS, 102, BOS, 100], [1, 1, 2, 2], [0, 1, 0, 1], [2, 2, 0, 0]),
        ([EOS, EOS, 0, 0], [101, BOS, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]),
    ]
    for row, (targets, inputs, segments, positions, domains) in zip(packed, expected, strict=False):
        assert row["tokens"][:, 1].tolist() == targets
        assert row["tokens"][:, 0].tolist() == inputs
        assert row["tokens_segment_ids"].tolist() == segments
        assert row["tokens_positions"].tolist() == positions
        assert row["tokens"][:, 3].tolist() == domains


def test_separate_rows_by_hand():
    # "abc" has 4 tokens, two rows of 3; "" has one.
    separate = rows.SeparateRows(corpus_of("abc", ""), np.array([1, 0]), 3)
    assert len(separate) == 3
    found = [separate[i]["tokens"][:, 1].tolist() for i in range(3)]
    assert found == [[EOS, 0, 0], [100, 101, 102], [EOS, 0, 0]]
    assert separate[2]["tokens"][0, 0] == 102


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    length=st.integers(1, 17),
    streams=st.integers(1, 3),
    packing=st.booleans(),
)
def test_every_target_is_in_one_row_of_one_stream(lengths, length, streams, packing):
    texts = [chr(97 + i) * size for i, size in enumerate(lengths)]
    corpus = corpus_of(*texts)
    streams = min(streams, len(texts))
    config = DataConfig(packing=packing, streams=streams, batch_size=streams)
    found = []
    for stream in range(streams):
        part = rows.rows_of_stream(corpus, config, stream, length)
        for row in (part[i] for i in range(len(part))):
            found += row["tokens"][row["tokens_segment_ids"] > 0, 1].tolist()
    assert sorted(found) == sorted(corpus.tokens.tolist())


def targets(config, count):
    batches = train_batches(config, Bytes())
    found = [batch["targets"] for batch in itertools.islice(batches, count)]
    batches.close()
    return np.concatenate(found)


def test_an_epoch_is_each_row_once_and_the_next_another_order(corpus):
    config = dataclasses.replace(corpus, shuffle_window=0, batch_size=1)
    # 40 documents of 2 characters and more, closed by an end token.
    total = sum(2 + i * 7 % 23 + 1 for i in range(40))
    epoch = -(-total // 8)
    found = targets(config, 2 * epoch).tolist()
    first, second = found[:epoch], found[epoch:]
    assert sorted(first) == sorted(second) and first != second
    assert sum(np.count_nonzero(row) for row in first) == total
    assert targets(config, 5).tolist() == first[:5]
    assert targets(dataclasses.replace(config, seed=1), 5).tolist() != first[:5]


@pytest.mark.parametrize(("window", "spread"), [(0, True), (16, False)])
def test_rows_of_a_long_document_are_spread_over_the_epoch(tmp_path, window, spread):
    # Two documents of 125 rows. Over a fair epoch, each quarter has 31 of the first, give or take
    # 5 (the deviation of 62 draws); within a window of 16, the quarters have 62 or none.
    source = write_corpus(tmp_path, ["a" * 1000, "b" * 1000], ["v"])
    config = DataConfig(source=source, data_dir=str(tmp_path / "data"), batch_size=1, seq_length=8)
    found = targets(dataclasses.replace(config, shuffle_window=window), 248)
    of_first = (found == ord("a") + 3).any(axis=1).reshape(4, 62).sum(axis=1)
    assert (abs(of_first - 31).max() < 20) == spread


def test_domains_and_long_vocabularies_come_through_the_file(tmp_path):
    mixture = MixtureConfig(num_documents=6, num_eval_documents=1, document_length=20)
    config = DataConfig(source="mixture", tokenizer="bytes", mixture=mixture, seq_length=21)
    config = dataclasses.replace(config, data_dir=str(tmp_path), shuffle_window=0, batch_size=6)
    (batch,) = itertools.islice(train_batches(config, Bytes()), 1)
    assert len(set(batch["domains"].ravel().tolist())) > 1
    assert (batch["domains"] == batch["domains"][:, :1]).all()


def test_a_damaged_file_of_tokens_is_named(corpus, tmp_path):
    config = dataclasses.replace(corpus, shuffle_window=0)
    batches = train_batches(config, Bytes())
    next(batches)
    batches.close()
    (path,) = (tmp_path / "data" / "tokens").iterdir()
    content = path.read_bytes()
    for wrong in (b"", content[:-1], content[:9] + b"!" + content[10:]):
        path.unlink()  # The old file may still be mapped, and reading a cut map ends the process.
        path.write_bytes(wrong)
        with pytest.raises(ConfigError, match=f"{path} is damaged: delete it"):
            train_batches(config, Bytes())


def test_a_corpus_that_is_too_large_keeps_a_window(corpus, monkeypatch):
    monkeypatch.setattr(rows, "LARGEST", 100)
    with pytest.raises(ConfigError, match="data.shuffle_window=0 .*such as 65536") as error:
        train_batches(dataclasses.replace(corpus, shuffle_window=0), Bytes())
    assert "\n" not in str(error.value)


def test_an_end_token_that_stands_in_the_text_closes_no_document():
    class Special(Bytes):
        def encode(self, text):
            return np.concatenate([super().encode(text), [EOS], super().encode("!")])

    content = b"".join(rows._tokens(Texts("ab", "c"), Special(), np.dtype("<u2")))
    tokens = np.frombuffer(content, "<u2")
    found = rows.Corpus(tokens, Texts("ab", "c"), Special())
    assert found.lengths.tolist() == [4, 3]  # a, b, ! and the end; c, ! and the end


def test_the_file_of_tokens_depends_on_its_type_and_on_the_end_token(tmp_path):
    config = DataConfig(data_dir=str(tmp_path))
    short, wide = np.dtype("<u2"), np.dtype("<i4")

    class Other(Bytes):
        eos_id = EOS + 1

    paths = {
        rows._path(config, Texts("a"), tokenizer, kind)
        for tokenizer in (Bytes(), Other())
        for kind in (short, wide)
    }
    assert len(paths) == 4
