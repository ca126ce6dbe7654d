import collections
import dataclasses
import itertools
import json
import tempfile
import types
from pathlib import Path

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import (
    Bytes,
    DataConfig,
    MixtureConfig,
    MixtureSource,
    Spans,
    eval_batches,
    loader,
    measure_throughput,
    open_source,
    open_tokenizer,
    train_batches,
)

from .corpora import write_corpus, write_rows

NAMES = {"inputs", "targets", "segments", "positions", "bytes", "domains"}
BOS, EOS = 1, 2


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() == NAMES
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def real_targets(batches):
    """All targets in order, padding left out."""
    return np.concatenate([b["targets"][b["segments"] > 0] for b in batches])


def documents_of(tokens):
    """Splits a stream of targets at its end tokens; drops an unfinished last document."""
    ends = np.flatnonzero(tokens == EOS)
    starts = np.concatenate([[0], ends[:-1] + 1])
    return [Bytes().decode(tokens[a:b]) for a, b in zip(starts, ends, strict=True)]


def expect(batch, expected):
    assert batch.keys() == NAMES
    for name, array in batch.items():
        assert array.dtype == np.int32
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_packed_rows_by_hand(corpus):
    config = dataclasses.replace(corpus, seq_length=4, batch_size=2)
    first, second = list(eval_batches(config, Bytes()))
    expect(
        first,
        {
            "inputs": [[BOS, 100, 101, BOS], [102, 103, 104, 105]],
            "targets": [[100, 101, EOS, 102], [103, 104, 105, 106]],
            "segments": [[1, 1, 1, 2], [1, 1, 1, 1]],
            "positions": [[0, 1, 2, 0], [0, 1, 2, 3]],
            "bytes": [[1, 1, 0, 1], [1, 1, 1, 1]],
            "domains": [[0] * 4, [0] * 4],
        },
    )
    expect(
        second,
        {
            "inputs": [[106, BOS, 107, 0], [0] * 4],
            "targets": [[EOS, 107, EOS, 0], [0] * 4],
            "segments": [[1, 2, 2, 0], [0] * 4],
            "positions": [[0, 0, 1, 0], [0] * 4],
            "bytes": [[0, 1, 0, 0], [0] * 4],
            "domains": [[0] * 4, [0] * 4],
        },
    )


def test_unpacked_rows_by_hand(corpus):
    config = dataclasses.replace(corpus, seq_length=4, batch_size=4, packing=False)
    (batch,) = list(eval_batches(config, Bytes()))
    expect(
        batch,
        {
            "inputs": [
                [BOS, 100, 101, 0],
                [BOS, 102, 103, 104],
                [105, 106, 0, 0],
                [BOS, 107, 0, 0],
            ],
            "targets": [
                [100, 101, EOS, 0],
                [102, 103, 104, 105],
                [106, EOS, 0, 0],
                [107, EOS, 0, 0],
            ],
            "segments": [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]],
            "positions": [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 0, 0], [0, 1, 0, 0]],
            "bytes": [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0]],
            "domains": [[0] * 4] * 4,
        },
    )


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    seq_length=st.integers(1, 17),
    packing=st.booleans(),
)
def test_every_target_once_with_its_true_input(lengths, seq_length, packing):
    texts = [chr(ord("a") + i) * length for i, length in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as directory:
        source = write_corpus(Path(directory), ["t"], texts)
        config = DataConfig(
            source=source, seq_length=seq_length, batch_size=3, packing=packing, prefetch=0
        )
        batches = list(eval_batches(config, Bytes()))
    assert documents_of(real_targets(batches)) == texts
    assert sum(b["bytes"].sum() for b in batches) == sum(lengths)
    targets = real_targets(batches)
    inputs = np.concatenate([b["inputs"][b["segments"] > 0] for b in batches])
    previous = np.concatenate([[EOS], targets[:-1]])
    np.testing.assert_array_equal(inputs, np.where(previous == EOS, BOS, previous))


@pytest.mark.parametrize("packing", [True, False])
def test_each_epoch_has_every_document_once_in_a_new_order(corpus, packing):
    config = dataclasses.replace(corpus, packing=packing)
    source = open_source(config, "train")
    texts = [source[i] for i in range(len(source))]
    batches = train_batches(config, Bytes())
    documents = documents_of(real_targets(take(batches, 100)))
    batches.close()
    first, second = documents[:40], documents[40:80]
    assert sorted(first) == sorted(second) == sorted(texts)
    assert first != second and first != texts


@pytest.mark.parametrize("window", [1, 64])
def test_the_first_rows_come_from_the_whole_corpus(tmp_path, window):
    # One document in each row, and the documents are numbered; 100 rows of 2,000 documents.
    rows = [{"text": f"{number:07d}"} for number in range(2000)]
    write_rows(tmp_path / "a.jsonl", rows)
    config = DataConfig(
        source=f"files:{tmp_path}/a.jsonl",
        data_dir=str(tmp_path / "data"),
        tokenizer="bytes",
        seq_length=8,
        batch_size=10,
        shuffle_window=window,
    )
    found = [
        int(text) for text in documents_of(real_targets(take(train_batches(config, Bytes()), 10)))
    ]
    assert len(set(found)) == 100
    # A fair draw has about 25 of 100 in each quarter of the corpus, with a deviation of 4.
    quarters = np.bincount(np.array(found) // 500, minlength=4)
    assert quarters.min() > 10


def test_seed_changes_the_order(corpus):
    one = next(train_batches(corpus, Bytes()))
    same = next(train_batches(corpus, Bytes()))
    other = next(train_batches(dataclasses.replace(corpus, seed=1), Bytes()))
    assert_same([one], [same])
    assert (one["targets"] != other["targets"]).any()


def test_window_shuffle_only_permutes_rows(corpus):
    ordered = take(train_batches(corpus, Bytes()), 10)
    config = dataclasses.replace(corpus, shuffle_window=20)
    shuffled = take(train_batches(config, Bytes()), 10)
    for start in (0, 5):
        rows = [
            collections.Counter(
                row.tobytes() for b in batches[start : start + 5] for row in b["targets"]
            )
            for batches in (ordered, shuffled)
        ]
        assert rows[0] == rows[1]
    assert any((a["targets"] != b["targets"]).any() for a, b in zip(ordered, shuffled, strict=True))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("window", "prefetch"), [(1, 0), (7, 3), (64, 2), (0, 2)])
def test_restored_state_continues_exactly(corpus, packing, window, prefetch):
    config = dataclasses.replace(
        corpus, packing=packing, shuffle_window=window, prefetch=prefetch, batch_size=2
    )
    reference = train_batches(config, Bytes())
    states, stream = [], []
    for _ in range(60):
        states.append(json.dumps(reference.get_state()))
        stream.append(next(reference))
    reference.close()
    for position in (0, 1, 2, 13, 31, 45):
        fresh = train_batches(config, Bytes())
        fresh.set_state(json.loads(states[position]))
        assert_same(take(fresh, 3), stream[position : position + 3])
        # A state taken after a restore is as good, and so is going back in the same iterator.
        again = json.dumps(fresh.get_state())
        fresh.set_state(json.loads(states[0]))
        assert_same(take(fresh, 2), stream[:2])
        fresh.set_state(json.loads(again))
        assert_same(take(fresh, 9), stream[position + 3 : position + 12])
        fresh.close()


def test_state_inside_a_long_document(tmp_path):
    source = write_corpus(tmp_path, ["a" * 500, "b" * 300], ["v"])
    config = DataConfig(source=source, seq_length=8, batch_size=1, shuffle_window=1, prefetch=2)
    reference = train_batches(config, Bytes())
    states, stream = [], []
    for _ in range(230):
        states.append(json.dumps(reference.get_state()))
        stream.append(next(reference))
    assert max(map(len, states)) < 500
    for position in (1, 37, 62, 63, 64, 99, 100, 101, 150):
        fresh = train_batches(config, Bytes())
        fresh.set_state(json.loads(states[position]))
        assert_same(take(fresh, 80), stream[position : position + 80])


def shares(config, processes):
    """The rows of each process, neighbouring ones."""
    rows = config.batch_size // processes
    return [range(p * rows, (p + 1) * rows) for p in range(processes)]


def joined(parts):
    """Global batches from those of the processes."""
    return [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]


def merged(states):
    return {"streams": {name: part for state in states for name, part in state["streams"].items()}}


def test_one_stream_is_the_plain_pipeline(corpus):
    config = dataclasses.replace(corpus, shuffle_window=7, batch_size=3)
    documents = grain.MapDataset.source(loader._Documents(open_source(config, "train"), Bytes()))
    rows = grain.experimental.ConcatThenSplitIterDataset(
        documents.shuffle(0).repeat(None).to_iter_dataset(), length_struct={"tokens": 8}
    ).map(loader._named)
    shuffled = grain.experimental.WindowShuffleIterDataset(rows, window_size=7, seed=0)
    plain = iter(shuffled.batch(3, drop_remainder=True))
    assert_same(take(train_batches(config, Bytes()), 40), take(plain, 40))


def test_each_stream_has_documents_of_its_own(corpus):
    source = open_source(corpus, "train")
    config = dataclasses.replace(corpus, streams=2)
    for stream, rows in enumerate(shares(config, 2)):
        batches = train_batches(config, Bytes(), rows=rows)
        documents = documents_of(real_targets(take(batches, 60)))
        assert next(batches)["inputs"].shape == (2, 8)
        assert sorted(documents[:20]) == sorted(source[i] for i in range(stream, 40, 2))


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("packing", [True, False])
def test_global_batches_do_not_depend_on_the_number_of_processes(corpus, packing, window):
    config = dataclasses.replace(corpus, streams=4, shuffle_window=window, packing=packing)
    whole = take(train_batches(config, Bytes()), 30)
    for processes in (2, 4):
        parts = [
            take(train_batches(config, Bytes(), rows=rows), 30)
            for rows in shares(config, processes)
        ]
        assert_same(joined(parts), whole)
    # A process may hold rows that are not neighbours.
    apart = take(train_batches(config, Bytes(), rows=[0, 2]), 30)
    assert_same(apart, [{name: b[name][[0, 2]] for name in b} for b in whole])


@pytest.mark.parametrize("window", [0, 12])
@pytest.mark.parametrize(("before", "after"), [(4, 1), (4, 2), (1, 4)])
def test_position_is_resumed_by_another_number_of_processes(corpus, before, after, window):
    config = dataclasses.replace(corpus, batch_size=8, streams=4, shuffle_window=window)
    whole = take(train_batches(config, Bytes()), 23)
    iterators = [train_batches(config, Bytes(), rows=rows) for rows in shares(config, before)]
    for iterator in iterators:
        take(iterator, 13)
    state = json.loads(json.dumps(merged([iterator.get_state() for iterator in iterators])))
    parts = []
    for rows in shares(config, after):
        resumed = train_batches(config, Bytes(), rows=rows)
        resumed.set_state(state)
        parts.append(take(resumed, 10))
    assert_same(joined(parts), whole[13:])


def test_spans_do_not_depend_on_the_number_of_processes(spans):
    spans = dataclasses.replace(spans, streams=2)
    tokenizer = open_tokenizer(spans)
    whole = take(train_batches(spans, tokenizer), 4)
    parts = [take(train_batches(spans, tokenizer, rows=rows), 4) for rows in shares(spans, 2)]
    for batch, both in zip(whole, joined(parts), strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, both[name])


def test_position_of_other_streams_is_refused(corpus):
    state = train_batches(corpus, Bytes()).get_state()
    batches = train_batches(dataclasses.replace(corpus, streams=2), Bytes())
    with pytest.raises(ValueError, match="does not hold stream 1"):
        batches.set_state(state)


def test_eval_rows_shuffled_are_the_same_rows_in_an_order_of_all_seeds(corpus):
    def rows(**changes):
        config = dataclasses.replace(corpus, **changes)
        found = [batch["targets"] for batch in eval_batches(config, Bytes())]
        return [row.tobytes() for batch in found for row in batch if row.any()]

    mixed = rows(eval_shuffle_window=1000)
    assert mixed != rows()
    assert sorted(mixed) == sorted(rows())
    assert mixed == rows(eval_shuffle_window=1000, seed=5)


def test_eval_batches_do_not_depend_on_the_number_of_processes(corpus):
    config = dataclasses.replace(corpus, seq_length=4)
    whole = list(eval_batches(config, Bytes()))
    parts = [list(eval_batches(config, Bytes(), rows=rows)) for rows in shares(config, 4)]
    assert_same(whole, joined(parts))


def test_domains_follow_the_documents():
    mixture = MixtureConfig(num_symbols=8, document_length=20, num_eval_documents=12)
    config = DataConfig(source="mixture", tokenizer="bytes", seq_length=16, mixture=mixture)
    source = MixtureSource(mixture, "eval")
    batches = list(eval_batches(config, open_tokenizer(config)))
    domains = np.concatenate([b["domains"][b["segments"] > 0] for b in batches])
    expected = np.repeat([source.domain(i) for i in range(12)], 21)
    np.testing.assert_array_equal(domains, expected)
    assert len(set(expected)) > 1


def test_real_library_counts_every_byte(library):
    source = open_source(library, "eval")
    total = sum(len(source[i].encode()) for i in range(len(source)))
    batches = list(eval_batches(library, open_tokenizer(library)))
    assert sum(int(b["bytes"].sum()) for b in batches) == total
    assert sum(int((b["targets"] == EOS).sum()) for b in batches) == len(source)
    assert batches[0]["inputs"].shape == batches[-1]["inputs"].shape == (16, 256)


def test_throughput_counts_tokens_per_second_after_the_first_batch(corpus, monkeypatch):
    batches = train_batches(corpus, Bytes())
    _, second, third = (int((next(batches)["segments"] > 0).sum()) for _ in range(3))
    batches.close()
    assert second and third
    # The clock is read once before the first batch that counts, once before each batch, before the
    # batch that would be late, and at the end: 0, 1, 2, 3 and 4 seconds.
    clock = types.SimpleNamespace(perf_counter=iter(range(100)).__next__)
    monkeypatch.setattr(loader, "time", clock)
    assert measure_throughput(corpus, seconds=3) == (second + third) / 4


def test_rows_must_be_whole_streams(corpus):
    with pytest.raises(ValueError, match="whole streams of 4 rows .* data.streams=1") as error:
        train_batches(corpus, Bytes(), rows=[0, 1])
    assert "\n" not in str(error.value)


def test_batch_must_split_over_streams(corpus):
    with pytest.raises(ValueError, match="batch_size=4 cannot be split over data.streams=3"):
        dataclasses.replace(corpus, streams=3)


def test_more_streams_than_documents(tmp_path):
    config = DataConfig(source=write_corpus(tmp_path, ["a"], ["b"]), batch_size=2, streams=2)
    with pytest.raises(ValueError, match="1 training .* cannot feed data.streams=2"):
        train_batches(config, Bytes())


def test_closed_iterator_refuses(corpus):
    batches = train_batches(corpus, Bytes())
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


SPANS = {"seq_length": 24, "target_length": 12, "spans": Spans(sentinels=9)}


@pytest.fixture
def spans(corpus):
    """28 text tokens have round(28 * 0.15) = 4 of noise in one span: 26 inputs; 25 have 23."""
    assert SPANS["spans"].lengths(24) == (26, 6)
    return dataclasses.replace(corpus, **SPANS)


def restored(row):
    """The text of a row: each sentinel of the inputs replaced by what the targets say of it."""
    targets = row["targets"][row["segments"] > 0].tolist()
    sources = row["encoder_inputs"][row["encoder_segments"] > 0].tolist()
    assert sources.pop() == targets.pop() == EOS
    said, text = {}, []
    for token in targets:
        if token >= 259:
            said[token] = []
        else:
            said[list(said)[-1]].append(token)
    for token in sources:
        text += said.pop(token) if token >= 259 else [token]
    assert not said
    return text


def test_spans_are_cut_out_of_packed_rows(spans):
    batches = list(eval_batches(spans, open_tokenizer(spans)))
    (plain,) = eval_batches(dataclasses.replace(spans, seq_length=26, spans=None), Bytes())
    (batch,) = batches
    assert batch.keys() == NAMES | {"encoder_inputs", "encoder_segments"}
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
    rows = [{name: array[i] for name, array in batch.items()} for i in range(4)]
    # The 11 tokens of the validation documents are one text; the other rows are padding.
    assert restored(rows[0]) == plain["targets"][0][:11].tolist()
    assert not any(array[1:].any() for array in batch.values())
    first = rows[0]
    assert first["inputs"].tolist() == [0, *first["targets"][:-1].tolist()]
    real = first["segments"] > 0
    np.testing.assert_array_equal(first["positions"], np.arange(12) * real)
    of_text = (first["targets"] >= 3) & (first["targets"] < 259)
    np.testing.assert_array_equal(first["bytes"], of_text)


def test_spans_of_an_epoch_hold_every_document(spans):
    tokenizer = open_tokenizer(spans)
    batches = take(train_batches(spans, tokenizer), 3)
    again = take(train_batches(spans, tokenizer), 3)
    for one, other in zip(batches, again, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    rows = [{name: array[i] for name, array in b.items()} for b in batches for i in range(4)]
    text = [token for row in rows for token in restored(row)]
    plain = take(train_batches(dataclasses.replace(spans, seq_length=26, spans=None), Bytes()), 3)
    assert text == real_targets(plain).tolist()


@pytest.mark.parametrize("window", [0, 8])
def test_spans_go_on_where_they_stopped(spans, window):
    spans = dataclasses.replace(spans, shuffle_window=window)
    tokenizer = open_tokenizer(spans)
    batches = train_batches(spans, tokenizer)
    take(batches, 3)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 5)
    resumed = train_batches(spans, tokenizer)
    resumed.set_state(state)
    for one, other in zip(take(resumed, 5), expected, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_spans_of_validation_do_not_depend_on_the_processes(spans):
    tokenizer = open_tokenizer(spans)
    whole = list(eval_batches(spans, tokenizer))
    parts = [list(eval_batches(spans, tokenizer, rows=rows)) for rows in shares(spans, 2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([half[name] for half in halves]))


def test_targets_know_the_domain_of_their_text(tmp_path):
    mixture = MixtureConfig(num_documents=8, num_eval_documents=8, document_length=200)
    config = DataConfig(source="mixture", tokenizer="bytes", mixture=mixture, batch_size=2)
    config = dataclasses.replace(config, **SPANS, packing=False)
    plain = dataclasses.replace(config, seq_length=26, spans=None)
    tokenizer = open_tokenizer(config)
    pairs = zip(eval_batches(config, tokenizer), eval_batches(plain, Bytes()), strict=True)
    seen = set()
    for batch, whole in pairs:
        expected = whole["domains"].max(1, keepdims=True) * (batch["segments"] > 0)
        np.testing.assert_array_equal(batch["domains"], expected)
        seen |= set(expected.ravel().tolist())
    assert len(seen) > 2


@pytest.mark.parametrize("window", [0, 1])
def test_masked_rows_hide_what_is_predicted(corpus, window):
    config = dataclasses.replace(
        corpus, seq_length=64, batch_size=4, mask_rate=0.25, shuffle_window=window
    )
    tokenizer = open_tokenizer(config)
    mask = tokenizer.vocab_size - 1
    assert tokenizer.vocab_size == Bytes().vocab_size + 1
    batches = take(train_batches(config, tokenizer), 8)
    assert all(batch.keys() == NAMES | {"predicted"} for batch in batches)
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    real, predicted = joined["segments"] > 0, joined["predicted"] > 0
    assert not (predicted & ~real).any()
    assert (joined["inputs"][predicted] == mask).all()
    # Other tokens are read at the place where they stand, and no text holds the mask.
    shown = real & ~predicted
    np.testing.assert_array_equal(joined["inputs"][shown], joined["targets"][shown])
    assert (joined["targets"] != mask).all()
    # 2,048 tokens at 0.25: the standard deviation of the share is 0.0096.
    assert predicted.sum() / real.sum() == pytest.approx(0.25, abs=0.04)
    # The masks of an epoch differ from those of the next, and a run repeats its own.
    again = take(train_batches(config, tokenizer), 8)
    for one, other in zip(batches, again, strict=True):
        np.testing.assert_array_equal(one["predicted"], other["predicted"])


def test_masked_validation_is_the_same_text(corpus):
    whole = dataclasses.replace(corpus, seq_length=64, batch_size=4)
    masked = dataclasses.replace(whole, mask_rate=0.15)
    targets = [real_targets(list(eval_batches(c, open_tokenizer(c)))) for c in (whole, masked)]
    np.testing.assert_array_equal(*targets)
