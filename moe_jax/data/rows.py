"""Rows of a whole corpus by index, so that one permutation shuffles an epoch.

The tokens of all documents lie in one file, which is memory-mapped: two bytes each where a
vocabulary has at most 65,536 ids, else four. It is made at the first start, beside the trained
tokenizers, and named after documents and tokenizer. In memory are 16 bytes per document; the
permutation of the rows is computed, not stored.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import tensorflow_datasets as tfds

from moe_jax.data.config import DataConfig
from moe_jax.data.directory import data_directory, write_parts
from moe_jax.data.sources import LARGEST, Source, open_source
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.tokenizers import identity_of
from moe_jax.errors import ConfigError

_LAYOUT = "1"
_SEAL = hashlib.sha256().digest_size


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The tokens of all documents, one after the other.

    Attributes:
        tokens: (tokens,) ids, each document closed by the end token.
        source: The documents, for their domains.
        tokenizer: Of the tokens.
    """

    tokens: np.ndarray
    source: Source
    tokenizer: Tokenizer

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """(documents,) int64, where each document ends."""
        return np.flatnonzero(self.tokens == self.tokenizer.eos_id) + 1

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """(documents,) int64, where each document begins."""
        return np.concatenate([[0], self.ends[:-1]])

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(documents,) int64, tokens of each document."""
        return self.ends - self.starts

    def columns(self, document: int, first: int, last: int) -> np.ndarray:
        """(last - first, 4) int32 of one document: inputs, targets, bytes, domains."""
        start = int(self.starts[document])
        targets = self.tokens[start + first : start + last].astype(np.int32)
        before = self.tokens[start + first - 1] if first else self.tokenizer.bos_id
        inputs = np.concatenate([[before], targets[:-1]]).astype(np.int32)
        domains = np.full_like(targets, self.source.domain(document))
        return np.stack([inputs, targets, self.tokenizer.byte_lengths[targets], domains], axis=-1)


class Rows(Protocol):
    """Rows by index, in Grain's layout of packed rows."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`."""
        ...


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Documents laid end to end and cut into rows; the last row is filled up with padding.

    Attributes:
        corpus: The tokens.
        documents: (documents,) which ones, in order.
        length: Tokens in a row.
    """

    corpus: Corpus
    documents: np.ndarray
    length: int

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.corpus.lengths[self.documents])

    def __len__(self) -> int:
        """Number of rows."""
        return -(-int(self._ends[-1]) // self.length)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`."""
        start = index * self.length
        stop = min(start + self.length, int(self._ends[-1]))
        pieces = []
        place = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = _begin(self._ends, place)
            end = min(stop, int(self._ends[place]))
            document = int(self.documents[place])
            pieces.append(self.corpus.columns(document, start - begin, end - begin))
            start, place = end, place + 1
        return joined_row(pieces, self.length)


@dataclasses.dataclass(frozen=True)
class SeparateRows:
    """Each document cut into rows of its own; its last row is filled up with padding.

    Attributes:
        corpus: The tokens.
        documents: (documents,) which ones.
        length: Tokens in a row.
    """

    corpus: Corpus
    documents: np.ndarray
    length: int

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """How many rows end with each document."""
        return np.cumsum(-(-self.corpus.lengths[self.documents] // self.length))

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`."""
        place = int(np.searchsorted(self._ends, index, side="right"))
        document = int(self.documents[place])
        first = (index - _begin(self._ends, place)) * self.length
        last = min(first + self.length, int(self.corpus.lengths[document]))
        columns = self.corpus.columns(document, first, last)
        return joined_row([columns], self.length)


def _begin(ends: np.ndarray, place: int) -> int:
    """Where the part at `place` begins, the one before ending there."""
    return int(ends[place - 1]) if place else 0


def joined_row(pieces: list[np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Lays pieces of documents, (tokens, 4) each, side by side and pads them to `length`."""
    row = {
        "tokens": np.zeros((length, pieces[0].shape[1]), np.int32),
        "tokens_segment_ids": np.zeros(length, np.int32),
        "tokens_positions": np.zeros(length, np.int32),
    }
    start = 0
    for number, piece in enumerate(pieces, 1):
        own = slice(start, start := start + len(piece))
        row["tokens"][own] = piece
        row["tokens_segment_ids"][own] = number
        row["tokens_positions"][own] = np.arange(len(piece))
    return row


def rows_of_stream(corpus: Corpus, config: DataConfig, stream: int, length: int) -> Rows:
    """The rows of documents `stream::data.streams`, which the seed lays in an order."""
    own = np.arange(stream, len(corpus.ends), config.streams)
    # The legacy generator, since NumPy promises that its permutations never change.
    order = np.random.RandomState([config.seed, stream]).permutation(own)
    return (PackedRows if config.packing else SeparateRows)(corpus, order, length)


def prepare_rows(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Makes the file of tokens that shuffling a whole corpus needs, if it is missing.

    Raises:
        ConfigError: See `open_corpus`.
    """
    if not config.shuffle_window:
        open_corpus(config, open_source(config, "train"), tokenizer)


def open_corpus(config: DataConfig, source: Source, tokenizer: Tokenizer) -> Corpus:
    """The tokens of `source`, from their file, which is made if it is missing.

    Raises:
        ConfigError: The corpus is too large for that, or its file cannot be written.
    """
    if source.size > LARGEST:
        raise ConfigError(
            f"data.shuffle_window=0 shuffles a whole corpus, of up to {LARGEST >> 30} GB of text, "
            f"and {config.source!r} has {source.size / (1 << 30):.0f} GB; set it to the rows that "
            "are shuffled together, such as 65536"
        )
    path = _path(config, source, tokenizer)
    kind = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<i4")
    if not path.is_file():
        write_parts(path, _sealed(_tokens(source, tokenizer, kind)))
    return Corpus(_read(path, kind), source, tokenizer)


def _path(config: DataConfig, source: Source, tokenizer: Tokenizer) -> tfds.core.Path:
    key = "\0".join([_LAYOUT, source.identity, identity_of(tokenizer)])
    name = f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.tokens"
    return data_directory(config) / "tokens" / name


def _tokens(source: Source, tokenizer: Tokenizer, kind: np.dtype) -> Iterator[bytes]:
    """The tokens of each document and an end token."""
    for index in range(len(source)):
        tokens = np.append(tokenizer.encode(source[index]), tokenizer.eos_id)
        yield tokens.astype(kind).tobytes()


def _sealed(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The parts, and then the SHA-256 of all of them."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
        yield part
    yield digest.digest()


def _read(path: tfds.core.Path, kind: np.dtype) -> np.ndarray:
    """The tokens of a sealed file, memory-mapped where it is on a local disk."""
    local = os.path.isfile(path) and os.path.getsize(path)
    content = np.memmap(path, np.uint8, "r") if local else np.frombuffer(path.read_bytes(), "u1")
    content = content.view(np.ndarray)  # Slices of a memmap cost more than those of an array.
    tokens, seal = content[:-_SEAL], content[-_SEAL:].tobytes()
    if hashlib.sha256(tokens).digest() != seal:
        raise ConfigError(f"{path} is damaged: delete it, and it is made again")
    return tokens.view(kind)
