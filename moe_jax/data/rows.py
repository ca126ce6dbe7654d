"""Rows of a whole corpus by index, so that one permutation shuffles an epoch.

One memory-mapped file holds the tokens of all documents, with two bytes per token if the vocabulary
has at most 65,536 ids, else four. The first run writes the file beside the trained tokenizers; its
name identifies documents and tokenizer. Memory holds 16 bytes per document; the permutation of the
rows is computed, not stored.
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
from moe_jax.data.source import Source
from moe_jax.data.sources import LARGEST, open_source
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.tokenizers import identity_of
from moe_jax.errors import ConfigError

_LAYOUT = "1"
_SEAL = hashlib.sha256().digest_size


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The tokens of all documents, one after the other.

    Attributes:
        tokens: Token ids, (tokens,); the end token closes each document.
        source: Source of the documents, for their domains.
        tokenizer: Tokenizer of the tokens.
    """

    tokens: np.ndarray
    source: Source
    tokenizer: Tokenizer

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """End of each document in ``tokens``, (documents,), int64."""
        return np.flatnonzero(self.tokens == self.tokenizer.eos_id) + 1

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Start of each document in ``tokens``, (documents,), int64."""
        return np.concatenate([[0], self.ends[:-1]])

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each document, (documents,), int64."""
        return self.ends - self.starts

    def columns(self, document: int, first: int, last: int) -> np.ndarray:
        """Returns inputs, targets, bytes and domains of one piece of a document.

        Args:
            document: Number of the document.
            first: First token of the piece, within the document.
            last: End of the piece, exclusive.

        Returns:
            Columns, (last - first, 4), int32.
        """
        start = int(self.starts[document])
        targets = self.tokens[start + first : start + last].astype(np.int32)
        before = self.tokens[start + first - 1] if first else self.tokenizer.bos_id
        inputs = np.concatenate([[before], targets[:-1]]).astype(np.int32)
        domains = np.full_like(targets, self.source.domain(document))
        return np.stack([inputs, targets, self.tokenizer.byte_lengths[targets], domains], axis=-1)


class Rows(Protocol):
    """Rows by index, in the layout of packed rows in Grain."""

    def __len__(self) -> int:
        """Returns the number of rows."""
        ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns row ``index``."""
        ...


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Concatenated documents, cut into rows; padding completes the last row.

    Attributes:
        corpus: Corpus of the documents.
        documents: Numbers of the documents, (documents,), in order.
        length: Number of tokens in a row.
    """

    corpus: Corpus
    documents: np.ndarray
    length: int

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.corpus.lengths[self.documents])

    def __len__(self) -> int:
        """Returns the number of rows."""
        return -(-int(self._ends[-1]) // self.length)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns row ``index``."""
        start = index * self.length
        stop = min(start + self.length, int(self._ends[-1]))
        pieces = []
        rank = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = _begin(self._ends, rank)
            end = min(stop, int(self._ends[rank]))
            document = int(self.documents[rank])
            pieces.append(self.corpus.columns(document, start - begin, end - begin))
            start, rank = end, rank + 1
        return joined_row(pieces, self.length)


@dataclasses.dataclass(frozen=True)
class SeparateRows:
    """Documents cut into separate rows; padding completes the last row of each document.

    Attributes:
        corpus: Corpus of the documents.
        documents: Numbers of the documents, (documents,), in order.
        length: Number of tokens in a row.
    """

    corpus: Corpus
    documents: np.ndarray
    length: int

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """Number of rows up to the end of each document, (documents,)."""
        return np.cumsum(-(-self.corpus.lengths[self.documents] // self.length))

    def __len__(self) -> int:
        """Returns the number of rows."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns row ``index``."""
        rank = int(np.searchsorted(self._ends, index, side="right"))
        document = int(self.documents[rank])
        first = (index - _begin(self._ends, rank)) * self.length
        last = min(first + self.length, int(self.corpus.lengths[document]))
        columns = self.corpus.columns(document, first, last)
        return joined_row([columns], self.length)


def _begin(ends: np.ndarray, rank: int) -> int:
    """Returns the start of document ``rank``, which is the end of the document before."""
    return int(ends[rank - 1]) if rank else 0


def joined_row(pieces: list[np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Concatenates pieces of documents, (tokens, 4) each, and pads the row to ``length``."""
    row = {
        "tokens": np.zeros((length, pieces[0].shape[1]), np.int32),
        "tokens_segment_ids": np.zeros(length, np.int32),
        "tokens_positions": np.zeros(length, np.int32),
    }
    start = 0
    for number, piece in enumerate(pieces, 1):
        span = slice(start, start := start + len(piece))
        row["tokens"][span] = piece
        row["tokens_segment_ids"][span] = number
        row["tokens_positions"][span] = np.arange(len(piece))
    return row


def rows_of_stream(corpus: Corpus, config: DataConfig, stream: int, length: int) -> Rows:
    """Returns the rows of documents ``stream::data.streams``, in an order drawn from the seed."""
    documents = np.arange(stream, len(corpus.ends), config.streams)
    # NumPy promises that the permutations of the legacy generator never change.
    order = np.random.RandomState([config.seed, stream]).permutation(documents)
    return (PackedRows if config.packing else SeparateRows)(corpus, order, length)


def prepare_rows(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Writes the token files that ``data.shuffle_window=0`` needs and that are missing.

    Raises:
        ConfigError: See ``open_corpus``.
    """
    if not config.shuffle_window:
        for part in config.parts.values():
            open_corpus(part, open_source(part, "train"), tokenizer)


def open_corpus(config: DataConfig, source: Source, tokenizer: Tokenizer) -> Corpus:
    """Opens the token file of ``source``; writes it first if it is missing.

    Raises:
        ConfigError: The corpus is too large for an index, or the file cannot be written or is
            damaged.
    """
    if source.size > LARGEST:
        raise ConfigError(
            f"data.shuffle_window=0 shuffles a whole corpus, of up to {LARGEST >> 30} GB of text, "
            f"and {config.source!r} has {source.size / (1 << 30):.0f} GB; set it to a number of "
            "rows to shuffle together, such as 65536"
        )
    kind = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<i4")
    path = _path(config, source, tokenizer, kind)
    if not path.is_file():
        write_parts(path, _sealed(_tokens(source, tokenizer, kind)))
    return Corpus(_read(path, kind), source, tokenizer)


def _path(
    config: DataConfig, source: Source, tokenizer: Tokenizer, kind: np.dtype
) -> tfds.core.Path:
    stored = f"{tokenizer.eos_id} {kind.str}"
    key = "\0".join([_LAYOUT, source.identity, identity_of(tokenizer), stored])
    name = f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.tokens"
    return data_directory(config) / "tokens" / name


def _tokens(source: Source, tokenizer: Tokenizer, kind: np.dtype) -> Iterator[bytes]:
    """Yields the bytes of the tokens of each document, closed by the end token."""
    for index in range(len(source)):
        ids = tokenizer.encode(source[index])
        # An end token that stands in the text would close the document too early.
        tokens = np.append(ids[ids != tokenizer.eos_id], tokenizer.eos_id)
        yield tokens.astype(kind).tobytes()


def _sealed(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the parts, and then the SHA-256 of all parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
        yield part
    yield digest.digest()


def _read(path: tfds.core.Path, kind: np.dtype) -> np.ndarray:
    """Returns the tokens of a sealed file; a file on a local disk is memory-mapped."""
    local = os.path.isfile(path) and os.path.getsize(path)
    content = np.memmap(path, np.uint8, "r") if local else np.frombuffer(path.read_bytes(), "u1")
    content = content.view(np.ndarray)  # Slices of a memmap cost more than slices of an array.
    tokens, seal = content[:-_SEAL], content[-_SEAL:].tobytes()
    if hashlib.sha256(tokens.data).digest() != seal:
        raise ConfigError(f"{path} is damaged: delete it, and the next run writes it again")
    return tokens.view(kind)
