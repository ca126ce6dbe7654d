"""Batches of packed token rows, built with Grain.

Documents are shuffled, tokenised, concatenated and cut into rows of ``seq_length`` tokens; rows are
shuffled again and batched. With ``data.shuffle_window=0`` an index (``moe_jax.data.rows``) shuffles
the rows of the whole corpus: the order of the documents is the same in all epochs, and each epoch
permutes all rows. Otherwise rows are shuffled within a window: memory holds only indices, so a
window suits a corpus of a terabyte, and a run sees the documents in their shuffled order. The state
of the iterator is a few numbers.

A row of the source ``blend`` holds documents of one part. Each part is shuffled and repeated alone,
and the rows of the parts follow each other in fixed proportions.

A batch is a dict of (batch, seq_length) int32 arrays:

* ``inputs``: Token before each target; the begin token at the start of a document.
* ``targets``: Tokens of the documents; the end token closes each document.
* ``segments``: Number of the document piece in the row, from 1; 0 for padding.
* ``positions``: Position within the piece.
* ``bytes``: Number of UTF-8 bytes of each target; 0 for the end token and padding.
* ``domains``: Language or topic of the document, see ``Source.domain``; in a blend, the number of
  the part.

* ``predicted``: Only for instruction data (``moe_jax.data.dialogues``): 1 for the tokens of
  answers, which are the targets that count.

With ``data.spans`` (``moe_jax.data.span_corruption``), a row is a text with spans cut out, in the
layout of T5: ``encoder_inputs`` and ``encoder_segments``, (batch, seq_length), hold the rest of the
text, and the arrays above, (batch, target_length), hold the spans to restore. The document pieces
in a row attend to each other, as in T5.

Padding is 0 in all arrays. A document that does not fit into a row continues in the next row; the
first input of a later piece is the real previous token, so each target has its own input and is
counted exactly once in an epoch.
"""

import dataclasses
import functools
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from moe_jax.data.config import BLEND, BlendConfig, DataConfig
from moe_jax.data.dialogues import Dialogues, dialogues_of
from moe_jax.data.rows import Corpus, joined_row, open_corpus, rows_of_stream
from moe_jax.data.source import Source
from moe_jax.data.sources import open_source
from moe_jax.data.span_corruption import SpanCorruption, Spans
from moe_jax.data.spare import without_spare_ids
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.tokenizers import open_tokenizer

Batch = dict[str, np.ndarray]

_COLUMNS = ("inputs", "targets", "bytes", "domains", "predicted")
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
# With many streams, the thread that prefetches the batches also reads the documents.
_READ_ONE_OF_MANY = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
_MANY = 4
_STREAMS, _ZIPPED = "streams", "parents"


def train_batches(
    config: DataConfig, tokenizer: Tokenizer, *, rows: Sequence[int] | None = None
) -> grain.DatasetIterator:
    """Returns endless training batches, or the rows of one process in these batches.

    Each epoch visits every document once, in a new order. Stream s of N (``data.streams``) reads
    documents s::N and fills rows [s * batch_size / N, (s + 1) * batch_size / N) of every batch.

    Args:
        config: The data config.
        tokenizer: Tokenizer of the run, such as ``open_tokenizer(config)``.
        rows: Rows of the batch to return, in order; ``None`` for all. Only the streams of these
            rows are read.

    Returns:
        Iterator of batches. Its ``get_state()`` is JSON-serialisable, and ``set_state()`` restores
        the exact position. The state holds each stream under its number, so the state of a global
        batch is the union of the states of all processes. ``close()`` stops the thread.

    Raises:
        FileNotFoundError: See ``open_source``.
        ValueError: See ``open_source``; or the rows do not form whole streams, or a source has
            fewer documents than streams.
    """
    streams = _streams_of(config, rows)
    read = _READ if len(streams) < _MANY else _READ_ONE_OF_MANY
    share = config.batch_size // config.streams
    sources = {name: _training_source(part, name) for name, part in config.parts.items()}
    of_part = [
        _rows_by_stream(part, sources[name], tokenizer, streams, read)
        for name, part in config.parts.items()
    ]
    by_stream = [_mixed(config, parts, sources) for parts in zip(*of_part, strict=True)]
    parts = [rows.batch(share, drop_remainder=True) for rows in by_stream]
    dataset = grain.experimental.ZipIterDataset(parts).map(_joined)
    return _Restorable(iter(_prefetched(dataset, config)), streams)


def eval_batches(
    config: DataConfig, tokenizer: Tokenizer, *, rows: Sequence[int] | None = None
) -> grain.DatasetIterator:
    """Returns batches of all validation documents, once, in the same order for every seed.

    Padding rows complete the last batch, so the number of batches does not depend on ``rows``. The
    parts of a blend follow each other, in batches of their own.

    Args:
        config: The data config.
        tokenizer: Tokenizer of the run, such as ``open_tokenizer(config)``.
        rows: Rows of each batch to return, in order; ``None`` for all.

    Returns:
        A finite iterator. With nats per target ``nll``, bits per byte over all batches is
        ``sum(nll[segments > 0]) / ln(2) / sum(bytes)``.

    Raises:
        FileNotFoundError: See ``open_source``.
        ValueError: See ``open_source``.
    """
    selected = slice(None) if rows is None else np.asarray(rows)
    parts = [_eval_dataset(part, tokenizer) for part in config.parts.values()]
    if config.source == BLEND:
        marked = config.marks_answers
        numbered = [part.map(_Numbered(number, marked)) for number, part in enumerate(parts)]
        dataset = grain.experimental.InterleaveIterDataset(numbered, cycle_length=1)
    else:
        (dataset,) = parts
    dataset = dataset.map(lambda batch: {name: array[selected] for name, array in batch.items()})
    return _Restorable(iter(_prefetched(dataset, config)))


def _eval_dataset(config: DataConfig, tokenizer: Tokenizer) -> grain.IterDataset:
    """Returns the whole validation batches of one source."""
    documents = _documents(config, open_source(config, "eval"), tokenizer)
    fill = functools.partial(grain.experimental.batch_and_pad, batch_size=config.batch_size)
    dataset = _rows(documents.to_iter_dataset(_READ), config, tokenizer)
    dataset = _shuffled(dataset, config.eval_shuffle_window, seed=0)
    return dataset.batch(config.batch_size, batch_fn=fill)


def measure_throughput(config: DataConfig, seconds: float = 5.0) -> float:
    """Measures the target tokens per second of the training loader with an idle consumer.

    Args:
        config: The data config.
        seconds: Duration of the measurement, after the first batch.

    Returns:
        Tokens per second, without padding.
    """
    batches = train_batches(config, open_tokenizer(config))
    next(batches)
    tokens, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        tokens += int(np.count_nonzero(next(batches)["segments"]))
    rate = tokens / (time.perf_counter() - start)
    batches.close()
    return rate


@dataclasses.dataclass(frozen=True)
class _Documents:
    """Tokenised documents by index: {"tokens": (tokens + 1, 4) int32}, see ``_COLUMNS``.

    Documents of instruction data have a fifth column, 1 for the tokens of answers.
    """

    source: Source
    tokenizer: Tokenizer
    dialogues: Dialogues | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        text, answers = self.source[index], None
        if self.dialogues is None:
            tokens = self.tokenizer.encode(text)
        else:
            tokens, answers = self.dialogues.encode(text)
        targets = np.append(tokens, np.int32(self.tokenizer.eos_id))
        inputs = np.insert(tokens, 0, self.tokenizer.bos_id)
        domains = np.full_like(targets, self.source.domain(index))
        columns = [inputs, targets, self.tokenizer.byte_lengths[targets], domains]
        if answers is not None:
            # The end token is of the last message.
            columns.append(np.append(answers, answers[-1:]).astype(np.int32))
        return {"tokens": np.stack(columns, axis=-1)}


@dataclasses.dataclass(frozen=True)
class _CutAndPad(grain.experimental.FlatMapTransform):
    """Cuts one document into rows of its own, in the layout of Grain's packing."""

    length: int

    def flat_map(self, element: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        tokens = element["tokens"]
        starts = range(0, len(tokens), self.length)
        pieces = (tokens[start : start + self.length] for start in starts)
        return [joined_row([piece], self.length) for piece in pieces]


@dataclasses.dataclass(frozen=True)
class _Corrupted:
    """Cuts spans out of a row of text; a row of fewer than two tokens becomes padding."""

    config: DataConfig
    spans: Spans
    tokenizer: Tokenizer

    def __call__(self, row: dict[str, np.ndarray], rng: np.random.Generator) -> Batch:
        real = row["tokens_segment_ids"] > 0
        text, domains = row["tokens"][real, 1], row["tokens"][real, 3]
        config, length = self.config, self.config.target_length
        if len(text) < 2:
            return self._padding()
        example = self._corruption.example(text, rng, config.seq_length, length)
        segments, targets = example["targets_segments"], example["targets"]
        return {
            "encoder_inputs": example["inputs"],
            "encoder_segments": example["inputs_segments"],
            "inputs": example["decoder_inputs"],
            "targets": targets,
            "bytes": self.tokenizer.byte_lengths[targets],
            "domains": domains[example["targets_places"]] * segments,
            "segments": segments,
            "positions": np.arange(length, dtype=np.int32) * segments,
        }

    def _padding(self) -> Batch:
        zeros = np.zeros(self.config.target_length, np.int32)
        names = ("inputs", "targets", "bytes", "domains", "segments", "positions")
        encoder = np.zeros(self.config.seq_length, np.int32)
        return {"encoder_inputs": encoder, "encoder_segments": encoder} | dict.fromkeys(
            names, zeros
        )

    @functools.cached_property
    def _corruption(self) -> SpanCorruption:
        return SpanCorruption(
            **dataclasses.asdict(self.spans),
            vocab_size=without_spare_ids(self.tokenizer).vocab_size,
            eos_id=self.tokenizer.eos_id,
            pad_id=self.tokenizer.pad_id,
        )


@dataclasses.dataclass(frozen=True)
class _Masked:
    """Replaces a share of a row's tokens by the mask; the model predicts these tokens.

    The batch has a further field ``predicted (L,)``, which is 1 for these tokens.
    """

    rate: float
    mask_id: int

    def __call__(self, row: dict[str, np.ndarray], rng: np.random.Generator) -> Batch:
        batch = _named(row)
        real = batch["segments"] > 0
        predicted = real & (rng.random(real.shape) < self.rate)
        shown = np.where(predicted, np.int32(self.mask_id), batch["targets"])
        inputs = np.where(real, shown, batch["inputs"])
        return batch | {"inputs": inputs, "predicted": predicted.astype(np.int32)}


class _Restorable(grain.DatasetIterator):
    """An iterator that accepts states from JSON and stops its thread before the interpreter ends.

    With ``streams``, the parent zips these streams, and the state holds each under its number.
    """

    def __init__(
        self, parent: grain.DatasetIterator, streams: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        self._held = [parent]
        self._streams = streams
        # The finalizer also runs at exit: a thread that outlives its modules prints tracebacks.
        self._stop = weakref.finalize(self, _close, self._held)

    def __next__(self) -> Batch:
        self._assert_not_closed()
        return next(self._held[0])

    def get_state(self) -> dict[str, Any]:
        self._assert_not_closed()
        state = self._held[0].get_state()
        if self._streams is None:
            return state
        parts = zip(self._streams, state[_ZIPPED], strict=True)
        return {_STREAMS: {str(stream): part for stream, part in parts}}

    def set_state(self, state: dict[str, Any]) -> None:
        self._assert_not_closed()
        if self._streams is not None:
            state = {_ZIPPED: [_part(state, stream) for stream in self._streams]}
        # JSON turns the tuples of Grain into lists, which its packing would read as other slices.
        self._held[0].set_state(_with_tuples(state))

    def close(self) -> None:
        super().close()
        self._stop()


def _part(state: dict[str, Any], stream: int) -> Any:
    try:
        return state[_STREAMS][str(stream)]
    except KeyError:
        raise ValueError(
            f"the position in the data does not hold stream {stream}: a run with another "
            "data.streams saved it"
        ) from None


def _close(held: list[grain.DatasetIterator]) -> None:
    held.pop().close()


def _training_source(config: DataConfig, name: str) -> Source:
    """Opens the training documents of one source, which must feed every stream."""
    source = open_source(config, "train")
    if len(source) < config.streams:
        of = f" of {name!r}" if name else ""
        raise ValueError(
            f"{len(source)} training document(s){of} cannot feed data.streams={config.streams}; "
            "use fewer streams or a larger source."
        )
    return source


def _rows_by_stream(
    config: DataConfig,
    source: Source,
    tokenizer: Tokenizer,
    streams: Sequence[int],
    read: grain.ReadOptions,
) -> list[grain.IterDataset]:
    """Returns the endless rows of one source in each stream."""
    if config.shuffle_window:
        documents = _documents(config, source, tokenizer)
        return [_stream(documents, config, tokenizer, stream, read) for stream in streams]
    corpus = open_corpus(config, source, tokenizer)
    return [_indexed_stream(corpus, config, stream, read) for stream in streams]


def _documents(config: DataConfig, source: Source, tokenizer: Tokenizer) -> grain.MapDataset:
    return grain.MapDataset.source(_Documents(source, tokenizer, dialogues_of(config, tokenizer)))


def _mixed(
    config: DataConfig, parts: Sequence[grain.IterDataset], sources: Mapping[str, Source]
) -> grain.IterDataset:
    """Returns the rows of one stream, mixed from the rows of the parts by their shares."""
    if config.source != BLEND:
        (rows,) = parts
        return rows
    shares = row_shares(config.blend, [source.size for source in sources.values()])
    marked = config.marks_answers
    numbered = [rows.map(_Numbered(number, marked)) for number, rows in enumerate(parts)]
    return grain.IterDataset.mix(numbered, shares)


def row_shares(blend: BlendConfig, sizes: Sequence[int]) -> list[float]:
    """Returns the share of each part of a blend in the training rows; the shares sum to 1.

    Args:
        blend: The parts, with weights or a temperature.
        sizes: Number of bytes of each part.
    """
    weights = [
        size ** (1 / blend.temperature) if part.weight is None else part.weight
        for part, size in zip(blend.parts, sizes, strict=True)
    ]
    return [weight / sum(weights) for weight in weights]


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """Sets the domain of every token to the number of a part of a blend.

    If some part is instruction data, every token of a plain text is predicted.
    """

    number: int
    marked: bool

    def __call__(self, rows: Batch) -> Batch:
        real = (rows["segments"] > 0).astype(np.int32)
        predicted = {"predicted": real} if self.marked else {}
        return predicted | rows | {"domains": self.number * real}


def _stream(
    documents: grain.MapDataset,
    config: DataConfig,
    tokenizer: Tokenizer,
    stream: int,
    read: grain.ReadOptions,
) -> grain.IterDataset:
    """Returns the endless rows of one stream."""
    share = documents[stream :: config.streams].shuffle(config.seed).repeat(None)
    dataset = _rows(share.to_iter_dataset(read), config, tokenizer, stream)
    return _shuffled(dataset, config.shuffle_window // config.streams, config.seed)


def _indexed_stream(
    corpus: Corpus, config: DataConfig, stream: int, read: grain.ReadOptions
) -> grain.IterDataset:
    """Returns the endless rows of one stream, shuffled over each epoch."""
    length = config.spans.lengths(config.seq_length)[0] if config.spans else config.seq_length
    rows = grain.MapDataset.source(rows_of_stream(corpus, config, stream, length))
    rows = rows.shuffle((config.seed + stream) % 2**32).repeat(None)
    corruption = _corruption(config, corpus.tokenizer)
    if corruption is None:
        rows = rows.map(_named)
    else:
        rows = rows.random_map(corruption, seed=(config.seed + stream) % 2**32)
    return rows.to_iter_dataset(read)


def _shuffled(rows: grain.IterDataset, window: int, seed: int) -> grain.IterDataset:
    if window <= 1:
        return rows
    return grain.experimental.WindowShuffleIterDataset(rows, window_size=window, seed=seed)


def _joined(parts: tuple[Batch, ...]) -> Batch:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _rows(
    documents: grain.IterDataset, config: DataConfig, tokenizer: Tokenizer, stream: int = 0
) -> grain.IterDataset:
    length = config.spans.lengths(config.seq_length)[0] if config.spans else config.seq_length
    rows = _cut(documents, config.packing, length)
    corruption = _corruption(config, tokenizer)
    if corruption is None:
        return rows.map(_named)
    return rows.random_map(corruption, seed=(config.seed + stream) % 2**32)


def _corruption(config: DataConfig, tokenizer: Tokenizer) -> _Corrupted | _Masked | None:
    """Returns what hides tokens of a row from the model; ``None`` for whole rows."""
    if config.spans is not None:
        return _Corrupted(config, config.spans, tokenizer)
    if config.mask_rate:
        return _Masked(config.mask_rate, without_spare_ids(tokenizer).vocab_size - 1)
    return None


def _cut(documents: grain.IterDataset, packing: bool, length: int) -> grain.IterDataset:
    if packing:
        return grain.experimental.ConcatThenSplitIterDataset(
            documents, length_struct={"tokens": length}
        )
    return grain.experimental.FlatMapIterDataset(documents, _CutAndPad(length))


def _prefetched(dataset: grain.IterDataset, config: DataConfig) -> grain.IterDataset:
    return grain.experimental.ThreadPrefetchIterDataset(
        dataset, prefetch_buffer_size=config.prefetch
    )


def _named(row: dict[str, np.ndarray]) -> Batch:
    names = zip(_COLUMNS, range(row["tokens"].shape[-1]), strict=False)
    columns = {name: np.ascontiguousarray(row["tokens"][..., index]) for name, index in names}
    return {
        **columns,
        "segments": row["tokens_segment_ids"],
        "positions": row["tokens_positions"],
    }


def _streams_of(config: DataConfig, rows: Sequence[int] | None) -> tuple[int, ...]:
    """Returns the streams that fill these rows of the batch, in order."""
    share = config.batch_size // config.streams
    wanted = list(range(config.batch_size) if rows is None else rows)
    streams = tuple(sorted({row // share for row in wanted}))
    if wanted != [row for s in streams for row in range(s * share, (s + 1) * share)]:
        raise ValueError(
            f"rows {wanted} of a batch do not form whole streams of {share} rows each; set "
            f"data.streams={config.streams} to a larger multiple."
        )
    return streams


def _with_tuples(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _with_tuples(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return tuple(_with_tuples(value) for value in state)
    return state
