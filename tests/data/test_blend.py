"""Weighted mixtures of sources."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from moe_jax.data import (
    BlendConfig,
    Bytes,
    DataConfig,
    PartConfig,
    check_source,
    empty_files,
    eval_batches,
    open_source,
    train_batches,
)
from moe_jax.data.loader import row_shares

from .corpora import write_corpus, write_rows


@pytest.fixture
def blend(tmp_path):
    """Digits as text files and letters as JSON lines, in the proportion 3 : 1."""
    (tmp_path / "digits").mkdir()
    digits = write_corpus(tmp_path / "digits", [str(i) * 20 for i in range(8)], ["99", "8"])
    rows = [{"body": chr(97 + i) * 20} for i in range(10)]
    write_rows(tmp_path / "letters.jsonl", rows)
    parts = (
        PartConfig(digits, "digits", weight=3.0),
        PartConfig(f"files:{tmp_path}/letters.jsonl", "letters", weight=1.0, text_feature="body"),
    )
    return DataConfig(
        source="blend",
        tokenizer="bytes",
        data_dir=str(tmp_path / "data"),
        seq_length=7,
        batch_size=8,
        shuffle_window=4,
        blend=BlendConfig(parts),
    )


def take(batches, count):
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def letters_of(batch):
    """Whether each row holds letters; digits and letters never share a row."""
    real = batch["segments"] > 0
    of_letters = (batch["targets"] >= ord("a") + 3) & real
    of_digits = (batch["targets"] >= ord("0") + 3) & ~of_letters & real
    assert not (of_letters.any(axis=1) & of_digits.any(axis=1)).any()
    return of_letters.any(axis=1)


@pytest.mark.parametrize("window", [0, 1, 4])
def test_rows_follow_the_weights_and_know_their_part(blend, window):
    config = dataclasses.replace(blend, shuffle_window=window)
    for batch in take(train_batches(config, Bytes()), 20):
        letters = letters_of(batch)
        assert letters.sum() == 2  # a quarter of 8 rows
        expected = letters[:, None] * (batch["segments"] > 0)
        np.testing.assert_array_equal(batch["domains"], expected)


def test_each_part_has_epochs_of_its_own(blend):
    # 9 documents of 21 tokens are 27 rows of 7 tokens each epoch; here 2 rows of 8 are letters.
    batches = take(train_batches(dataclasses.replace(blend, shuffle_window=1), Bytes()), 27)
    rows = [row for batch in batches for row in batch["targets"][letters_of(batch)].tolist()]
    first, second = rows[:27], rows[27:]
    assert sorted(first) == sorted(second) and first != second


def test_shares_by_weight_and_by_temperature():
    def shares(temperature, *weights):
        parts = tuple(PartConfig(f"files:{i}", weight=w) for i, w in enumerate(weights))
        return row_shares(BlendConfig(parts, temperature), [900, 100])

    assert shares(1.0, 2.0, 6.0) == [0.25, 0.75]
    assert shares(1.0, None, None) == [0.9, 0.1]
    # Square roots: 30 and 10.
    assert shares(2.0, None, None) == pytest.approx([0.75, 0.25])
    assert shares(1e6, None, None) == pytest.approx([0.5, 0.5], abs=1e-5)


@pytest.mark.parametrize("window", [0, 4])
def test_order_is_the_same_for_many_processes_and_across_a_resume(blend, window):
    config = dataclasses.replace(blend, streams=2, shuffle_window=window)
    whole = take(train_batches(config, Bytes()), 15)
    first = [train_batches(config, Bytes(), rows=range(4 * i, 4 * i + 4)) for i in range(2)]
    before = [[next(batches) for _ in range(6)] for batches in first]
    states = [batches.get_state()["streams"] for batches in first]
    resumed = train_batches(config, Bytes())
    resumed.set_state(json.loads(json.dumps({"streams": states[0] | states[1]})))
    parts = [
        {name: np.concatenate([one[name], other[name]]) for name in one}
        for one, other in zip(*before, strict=True)
    ]
    for found, expected in zip(parts + take(resumed, 9), whole, strict=True):
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])


def test_validation_batches_hold_one_part_each(blend):
    (digits, letters) = take(eval_batches(blend, Bytes()), 9)
    assert not letters_of(digits).any() and letters_of(letters)[:3].all()
    (alone,) = take(eval_batches(blend.parts["letters"], Bytes()), 9)
    np.testing.assert_array_equal(letters["targets"], alone["targets"])
    assert set(letters["domains"][letters["segments"] > 0].tolist()) == {1}


def test_the_documents_of_all_parts_are_one_source(blend, tmp_path):
    (tmp_path / "digits" / "empty.txt").write_text("")
    check_source(blend)
    source = open_source(blend, "train")
    assert len(source) == 8 + 9
    assert (source.domain(7), source.domain(8), source[8]) == (0, 1, "a" * 20)
    assert [path[-9:] for path in empty_files(blend)] == ["empty.txt"]


def test_limits_hold_for_each_part(blend):
    config = dataclasses.replace(blend, train_documents=3, eval_documents=1)
    assert len(open_source(config, "train")) == 6 and len(open_source(config, "eval")) == 2


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ((), "no sources: list them in data.blend.parts"),
        ((PartConfig("files:a"), PartConfig("files:a")), "two parts 'files:a'"),
        ((PartConfig("a", weight=1.0), PartConfig("b")), "'b' has no weight"),
        ((PartConfig("blend"),), "cannot be a blend"),
    ],
)
def test_a_wrong_blend_is_refused(parts, said):
    with pytest.raises(ValueError, match=said) as error:
        DataConfig("blend", blend=BlendConfig(parts))
    assert "\n" not in str(error.value)


def test_a_part_that_cannot_feed_the_streams_is_named(blend):
    config = dataclasses.replace(blend, train_documents=3, streams=4)
    with pytest.raises(ValueError, match=r"3 training document\(s\) of 'digits' cannot feed"):
        train_batches(config, Bytes())


def test_the_source_of_a_part_is_checked(blend):
    parts = (*blend.blend.parts, PartConfig("files:/nonexistent/*", weight=1.0))
    with pytest.raises(FileNotFoundError, match="no file matches"):
        check_source(dataclasses.replace(blend, blend=BlendConfig(parts[:1] + parts[2:])))
