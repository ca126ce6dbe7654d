"""Lossless tokenizers: raw bytes, or a SentencePiece model trained on the corpus.

Both tokenizers restore every text exactly and know the number of UTF-8 bytes of each token, so a
loss per token converts to bits per byte without approximation.
"""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm
import tensorflow_datasets as tfds

from moe_jax.data.config import DataConfig
from moe_jax.data.dialogues import PlainTexts
from moe_jax.data.directory import data_directory, write_parts
from moe_jax.data.hf_tokenizer import HFTokenizer, check_hf, is_hf, load_hf, open_hf
from moe_jax.data.sample import SAMPLED_BYTES, even_sample
from moe_jax.data.sentinels import WithSentinels, load_sentinels
from moe_jax.data.source import Source
from moe_jax.data.sources import Split, open_source
from moe_jax.data.spare import load_spare_ids, without_spare_ids
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.views import Joined
from moe_jax.errors import ConfigError, line_of

_MODEL_FILE = "tokenizer.model"
_BYTES_FILE = "tokenizer.json"
_MODEL_PREFIX = "sentencepiece:"
_RESTORE = "put the file of the run back from a copy, or start a new run in another --workdir"

# SentencePiece ends a sentence at a newline and writes a space as U+2581. A newline is therefore
# encoded as a private-use character. A text with U+2581 or with this character is escaped, by a
# second private-use character.
NEWLINE, ESCAPE, SPACE = "\ue000", "\ue001", "\u2581"
ESCAPES = {ESCAPE: "e", NEWLINE: "n", SPACE: "u"}
_ESCAPED_BYTES = 2  # An escape and its ASCII letter encode a character of 3 UTF-8 bytes.

_SENTENCE_CHARACTERS = 1000  # SentencePiece drops sentences of more than 4192 bytes.
_SPECIALS = 4
_SMALLEST_VOCABULARY = _SPECIALS + 256 + 3
_TRAINER: dict[str, Any] = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
    "split_by_whitespace": False,
    "split_by_unicode_script": False,
    "split_by_number": False,
    "allow_whitespace_only_pieces": True,
    "max_sentencepiece_length": 32,
    "character_coverage": 0.9995,
    "required_chars": NEWLINE + ESCAPE + SPACE,
    "hard_vocab_limit": False,
    "pad_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "unk_id": 3,
    "num_threads": 1,
    "minloglevel": 2,
}


class Bytes:
    """A tokenizer with one token for each UTF-8 byte: id = byte + 3, after the three specials."""

    vocab_size = 259
    pad_id = 0
    bos_id = 1
    eos_id = 2
    byte_lengths = np.array([0] * 3 + [1] * 256, np.int32)

    def encode(self, text: str) -> np.ndarray:
        """See ``Tokenizer``."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + 3

    def decode(self, ids: np.ndarray) -> str:
        """See ``Tokenizer``."""
        ids = np.asarray(ids, np.int64)
        codes = ids[(ids >= 3) & (ids < self.vocab_size)] - 3
        return codes.astype(np.uint8).tobytes().decode("utf-8", "replace")

    def piece(self, token: int) -> str:
        """See ``Tokenizer``."""
        if token < 3:
            return ("<pad>", "<s>", "</s>")[token]
        return chr(token - 3) if 0x20 <= token - 3 < 0x7F else f"<0x{token - 3:02X}>"

    def save(self, directory: str | Path) -> None:
        """See ``Tokenizer``."""
        write_parts(tfds.core.Path(directory) / _BYTES_FILE, [b'{"tokenizer": "bytes"}\n'])


@dataclasses.dataclass(frozen=True, eq=False)
class SentencePiece:
    """A SentencePiece model that restores every byte of the text.

    Attributes:
        model: Serialised model, as ``train_sentencepiece`` returns it.

    Raises:
        ValueError: The model is not lossless.
    """

    model: bytes

    def __post_init__(self) -> None:
        """Loads the model, so that a bad model fails here and not at first use."""
        missing = [c for c in (NEWLINE, ESCAPE, SPACE) if self._processor.piece_to_id(c) == 3]
        probe = "  a \t\r\n\n\u2581\ue000\ue001\ufb01\U0001f600 "
        specials = (self.pad_id, self.bos_id, self.eos_id, self._processor.unk_id())
        if missing or specials != (0, 1, 2, 3) or self.decode(self.encode(probe)) != probe:
            raise ValueError(
                "the SentencePiece model is not lossless; use one that data.tokenizer "
                "'sentencepiece' trained and saved."
            )

    @property
    def vocab_size(self) -> int:
        """See ``Tokenizer``."""
        return self._processor.vocab_size()

    @property
    def pad_id(self) -> int:
        """See ``Tokenizer``."""
        return self._processor.pad_id()

    @property
    def bos_id(self) -> int:
        """See ``Tokenizer``."""
        return self._processor.bos_id()

    @property
    def eos_id(self) -> int:
        """See ``Tokenizer``."""
        return self._processor.eos_id()

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """See ``Tokenizer``."""
        lengths = [self._byte_length(token) for token in range(self.vocab_size)]
        return np.array(lengths, np.int32)

    def encode(self, text: str) -> np.ndarray:
        """See ``Tokenizer``."""
        return np.asarray(self._processor.encode(_escape(text), return_type="numpy"), np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """See ``Tokenizer``."""
        plain = [int(i) for i in np.asarray(ids).ravel() if _SPECIALS <= i < self.vocab_size]
        return _unescape(self._processor.decode(plain)) if plain else ""

    def piece(self, token: int) -> str:
        """See ``Tokenizer``."""
        return self._processor.id_to_piece(int(token)).replace(NEWLINE, "\n").replace(SPACE, " ")

    def save(self, directory: str | Path) -> None:
        """See ``Tokenizer``."""
        write_parts(tfds.core.Path(directory) / _MODEL_FILE, [self.model])

    @functools.cached_property
    def _processor(self) -> spm.SentencePieceProcessor:
        try:
            return spm.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError as error:
            raise ValueError("the file is not a SentencePiece model.") from error

    def _byte_length(self, token: int) -> int:
        if token < _SPECIALS:
            return 0
        if self._processor.is_byte(token):
            return 1
        piece = self._processor.id_to_piece(token)
        plain = piece.replace(NEWLINE, "\n").replace(SPACE, " ").replace(ESCAPE, "")
        return len(plain.encode("utf-8")) + _ESCAPED_BYTES * piece.count(ESCAPE)


def open_tokenizer(config: DataConfig) -> Tokenizer:
    """Opens the configured tokenizer; trains it first if its model is not cached.

    The data directory caches a trained model; the name of the file depends on the training
    documents and on every setting of the training.

    Args:
        config: The data config.

    Returns:
        Tokenizer of the run; it has sentinels if ``data.spans`` or ``data.mask_rate`` is set.

    Raises:
        FileNotFoundError: ``sentencepiece:PATH`` names no file, or the source is missing.
        ValueError: The tokenizer is unknown, or the vocabulary is too small.
    """
    check_tokenizer(config)
    base = _open_base(config)
    return WithSentinels(base, config.sentinels) if config.sentinels else base


def _open_base(config: DataConfig) -> Tokenizer:
    if is_hf(config.tokenizer):
        return open_hf(config.tokenizer, config.sentinels)
    if config.tokenizer == "bytes":
        return Bytes()
    if config.tokenizer.startswith(_MODEL_PREFIX):
        return _read_model(_model_path(config), "choose another data.tokenizer")
    source = texts(config, "train")
    cached = _cache_path(config, source)
    if not cached.is_file():
        write_parts(cached, [train_sentencepiece(source, config.vocab_size).model])
    return _read_model(cached, "delete it, and the next run trains it again")


def texts(config: DataConfig, split: Split) -> Source:
    """Returns the documents of a split as plain texts, on which a tokenizer is trained.

    Raises:
        FileNotFoundError: See ``open_source``.
        ValueError: See ``open_source``.
    """
    if not config.marks_answers:
        return open_source(config, split)
    sources = [(part, open_source(part, split)) for part in config.parts.values()]
    return Joined(
        tuple(PlainTexts(source) if part.marks_answers else source for part, source in sources)
    )


def _model_path(config: DataConfig) -> tfds.core.Path:
    return tfds.core.Path(config.tokenizer.removeprefix(_MODEL_PREFIX)).expanduser()


def _read_model(path: tfds.core.Path, remedy: str) -> SentencePiece:
    """Reads a model file of this package.

    Raises:
        ConfigError: The file is not a usable model; the message names ``remedy``.
    """
    try:
        return SentencePiece(path.read_bytes())
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"{path} cannot serve as tokenizer ({line_of(error)}): {remedy}"
        ) from error


def check_tokenizer(config: DataConfig) -> None:
    """Raises the errors of ``open_tokenizer`` early, without training a model.

    Args:
        config: The data config.

    Raises:
        FileNotFoundError: ``sentencepiece:PATH`` names no file.
        ConfigError: The file is not a model of this package.
        ValueError: The tokenizer is unknown, or the vocabulary is too small.
    """
    if is_hf(config.tokenizer):
        return check_hf(config.tokenizer)
    if config.tokenizer.startswith(_MODEL_PREFIX):
        path = _model_path(config)
        if not path.is_file():
            raise FileNotFoundError(f"data.tokenizer: there is no model file {path}.")
        _open_base(config)
    elif config.tokenizer == "sentencepiece":
        _check_vocabulary(config.vocab_size)
    elif config.tokenizer != "bytes":
        raise ValueError(
            f"data.tokenizer {config.tokenizer!r} is unknown; use bytes, sentencepiece, "
            "sentencepiece:PATH or hf:FOLDER."
        )


def same_tokenizer(one: Tokenizer, other: Tokenizer) -> bool:
    """Returns whether two tokenizers encode every text to the same ids."""
    return _content(one) == _content(other)


def identity_of(tokenizer: Tokenizer) -> str:
    """Returns a name for the encoding of a tokenizer; sentinels and spare ids do not change it."""
    model, _ = _content(tokenizer)
    return "bytes" if model is None else hashlib.sha256(model).hexdigest()


def contradiction(config: DataConfig, trained: DataConfig, tokenizer: Tokenizer) -> str:
    """Compares a data config with the tokenizer of another run.

    Args:
        config: The data config of this run.
        trained: The data config of the other run.
        tokenizer: Tokenizer of the other run.

    Returns:
        The difference and its remedy as a message, or "" if the config fits the tokenizer.

    Raises:
        FileNotFoundError: ``sentencepiece:PATH`` names no file.
    """
    model, sentinels = _content(tokenizer)
    wanted = config.sentinels
    if wanted != sentinels:
        return (
            f"the other run has {sentinels} sentinels and this run {wanted}; set data.spans as in "
            "the other run"
        )
    base = _base(tokenizer)
    bytes_differ = (config.tokenizer == "bytes") != (model is None)
    if bytes_differ or is_hf(config.tokenizer) != isinstance(base, HFTokenizer):
        return f"this run has data.tokenizer={config.tokenizer!r}; set it to {trained.tokenizer!r}"
    if is_hf(config.tokenizer) and _content(_open_base(config))[0] != model:
        return (
            f"data.tokenizer={config.tokenizer!r} is another tokenizer; set it to "
            f"{trained.tokenizer!r}"
        )
    if config.tokenizer.startswith(_MODEL_PREFIX) and _content(_open_base(config))[0] != model:
        return f"data.tokenizer={config.tokenizer!r} is another model; set it to 'sentencepiece'"
    sizes = (trained.vocab_size, base.vocab_size)
    if config.tokenizer == "sentencepiece" and config.vocab_size not in sizes:
        return f"this run has data.vocab_size={config.vocab_size}; set it to {sizes[0]}"
    return ""


def _content(tokenizer: Tokenizer) -> tuple[bytes | None, int]:
    """Returns the model, ``None`` for ``bytes``, and the number of sentinels."""
    base, outer = _base(tokenizer), without_spare_ids(tokenizer)
    sentinels = outer.sentinels if isinstance(outer, WithSentinels) else 0
    return base.model if isinstance(base, SentencePiece | HFTokenizer) else None, sentinels


def _base(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer below sentinels and spare ids."""
    outer = without_spare_ids(tokenizer)
    return outer.base if isinstance(outer, WithSentinels) else outer


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Reads the tokenizer that ``Tokenizer.save`` wrote, with its sentinels and spare ids.

    Args:
        directory: Folder of the tokenizer, such as the working directory of a run.

    Raises:
        FileNotFoundError: ``directory`` holds no tokenizer.
        ConfigError: A file of the tokenizer is damaged.
    """
    released = load_hf(directory)
    if released is None:
        return load_spare_ids(directory, _load_own(directory))
    return load_spare_ids(directory, load_sentinels(directory, released))


def _load_own(directory: str | Path) -> Tokenizer:
    """Reads a tokenizer of this package, with its sentinels; see ``load_tokenizer``."""
    folder = tfds.core.Path(directory)
    if (folder / _MODEL_FILE).is_file():
        model = _read_model(folder / _MODEL_FILE, _RESTORE)
        return load_sentinels(folder, model)
    if (folder / _BYTES_FILE).is_file():
        return load_sentinels(folder, Bytes())
    raise FileNotFoundError(
        f"{folder} holds no {_MODEL_FILE} and no {_BYTES_FILE}; give a run's working directory."
    )


def train_sentencepiece(source: Source, vocab_size: int) -> SentencePiece:
    """Trains a byte-pair model (Sennrich et al., 2016) whose tokens may span spaces and lines.

    Args:
        source: Training documents; training uses an even sample of about 16 MB of a larger corpus.
        vocab_size: Number of tokens, specials and the 256 bytes included.

    Returns:
        Trained model, with fewer tokens if the corpus has no more pairs to merge; the same
        documents always give the same model.

    Raises:
        ValueError: The vocabulary is too small for the specials, bytes and required characters.
    """
    _check_vocabulary(vocab_size)
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=_sentences(source),
            model_writer=model,
            vocab_size=vocab_size,
            **_TRAINER,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot train {vocab_size} tokens on this corpus: {reason}") from error
    return SentencePiece(model.getvalue())


def _check_vocabulary(vocab_size: int) -> None:
    if vocab_size < _SMALLEST_VOCABULARY:
        raise ValueError(
            f"data.vocab_size must be at least {_SMALLEST_VOCABULARY}, got {vocab_size}."
        )


def _sentences(source: Source) -> Iterator[str]:
    """Yields pieces of an even sample of the documents, escaped."""
    left = 2 * SAMPLED_BYTES
    for document in even_sample(source):
        text = _escape(document)[:left]
        left -= len(text)
        for start in range(0, len(text), _SENTENCE_CHARACTERS):
            yield text[start : start + _SENTENCE_CHARACTERS]


def _escape(text: str) -> str:
    for character, letter in ESCAPES.items():
        text = text.replace(character, ESCAPE + letter)
    return text.replace("\n", NEWLINE)


def _unescape(text: str) -> str:
    text = text.replace(NEWLINE, "\n")
    first, *rest = text.split(ESCAPE)
    restored = {letter: character for character, letter in ESCAPES.items()}
    return first + "".join(restored.get(part[:1], part[:1]) + part[1:] for part in rest)


def _cache_path(config: DataConfig, source: Source) -> tfds.core.Path:
    settings = [source.identity, config.text_feature, config.vocab_size, _TRAINER, SAMPLED_BYTES]
    key = json.dumps([*settings, spm.__version__]).encode()
    name = f"sentencepiece_{config.vocab_size}_{hashlib.sha256(key).hexdigest()[:16]}.model"
    return data_directory(config) / "tokenizers" / name
