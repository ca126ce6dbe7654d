"""Lossless tokenizers: raw bytes, or a SentencePiece model trained on the corpus.

Both give back exactly the text they were given, and know how many UTF-8 bytes each token stands
for, so a loss per token can be turned into bits per byte without approximation.
"""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece as spm
import tensorflow_datasets as tfds

from moe_jax.data.config import DataConfig
from moe_jax.data.directory import data_directory, write_parts
from moe_jax.data.hf_tokenizer import HFTokenizer, check_hf, is_hf, load_hf, open_hf
from moe_jax.data.sentinels import WithSentinels, load_sentinels
from moe_jax.data.sources import Source, open_source
from moe_jax.data.spare import load_spare_ids, without_spare_ids
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import ConfigError, line_of

_MODEL_FILE = "tokenizer.model"
_BYTES_FILE = "tokenizer.json"
_MODEL_PREFIX = "sentencepiece:"
_RESTORE = "put the run's own file back from a copy, or start anew in another --workdir"

# SentencePiece ends a sentence at a newline and writes a space as U+2581, so neither can stand for
# itself. Two private-use characters take their place; texts that hold these are escaped.
_NEWLINE, _ESCAPE, _SPACE = "\ue000", "\ue001", "\u2581"
_ESCAPES = {_ESCAPE: "e", _NEWLINE: "n", _SPACE: "u"}
_ESCAPED_BYTES = 2  # An escape and its ASCII letter stand for one character of 3 UTF-8 bytes.

_TRAINING_BYTES = 16_000_000
_SENTENCE_CHARACTERS = 1000  # SentencePiece drops sentences of more than 4192 bytes.
_SPECIALS = 4
_SMALLEST_VOCABULARY = _SPECIALS + 256 + 3
_TRAINER = {
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
    "required_chars": _NEWLINE + _ESCAPE + _SPACE,
    "hard_vocab_limit": False,
    "pad_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "unk_id": 3,
    "num_threads": 1,
    "minloglevel": 2,
}


class Bytes:
    """One token for each UTF-8 byte: id = byte + 3, after padding, begin and end."""

    vocab_size = 259
    pad_id = 0
    bos_id = 1
    eos_id = 2
    byte_lengths = np.array([0] * 3 + [1] * 256, np.int32)

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + 3

    def decode(self, ids: np.ndarray) -> str:
        """See `Tokenizer`."""
        ids = np.asarray(ids, np.int64)
        kept = ids[(ids >= 3) & (ids < self.vocab_size)] - 3
        return kept.astype(np.uint8).tobytes().decode("utf-8", "replace")

    def piece(self, token: int) -> str:
        """See `Tokenizer`."""
        if token < 3:
            return ("<pad>", "<s>", "</s>")[token]
        return chr(token - 3) if 0x20 <= token - 3 < 0x7F else f"<0x{token - 3:02X}>"

    def save(self, directory: str | Path) -> None:
        """See `Tokenizer`."""
        write_parts(tfds.core.Path(directory) / _BYTES_FILE, [b'{"tokenizer": "bytes"}\n'])


@dataclasses.dataclass(frozen=True, eq=False)
class SentencePiece:
    """A SentencePiece model that keeps every byte of the text.

    Attributes:
        model: The serialised model, as `train_sentencepiece` returns it.

    Raises:
        ValueError: The model was trained with settings under which it would lose text.
    """

    model: bytes

    def __post_init__(self) -> None:
        """Loads the model once, to fail here rather than at first use."""
        missing = [c for c in (_NEWLINE, _ESCAPE, _SPACE) if self._processor.piece_to_id(c) == 3]
        probe = "  a \t\r\n\n\u2581\ue000\ue001\ufb01\U0001f600 "
        specials = (self.pad_id, self.bos_id, self.eos_id, self._processor.unk_id())
        if missing or specials != (0, 1, 2, 3) or self.decode(self.encode(probe)) != probe:
            raise ValueError(
                "the SentencePiece model is not lossless; use one that data.tokenizer "
                "'sentencepiece' trained and saved."
            )

    @property
    def vocab_size(self) -> int:
        """See `Tokenizer`."""
        return self._processor.vocab_size()

    @property
    def pad_id(self) -> int:
        """See `Tokenizer`."""
        return self._processor.pad_id()

    @property
    def bos_id(self) -> int:
        """See `Tokenizer`."""
        return self._processor.bos_id()

    @property
    def eos_id(self) -> int:
        """See `Tokenizer`."""
        return self._processor.eos_id()

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """See `Tokenizer`."""
        lengths = [self._byte_length(token) for token in range(self.vocab_size)]
        return np.array(lengths, np.int32)

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`."""
        return np.asarray(self._processor.encode(_escape(text), return_type="numpy"), np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """See `Tokenizer`."""
        kept = [int(i) for i in np.asarray(ids).ravel() if _SPECIALS <= i < self.vocab_size]
        return _unescape(self._processor.decode(kept)) if kept else ""

    def piece(self, token: int) -> str:
        """See `Tokenizer`."""
        return self._processor.id_to_piece(int(token)).replace(_NEWLINE, "\n").replace(_SPACE, " ")

    def save(self, directory: str | Path) -> None:
        """See `Tokenizer`."""
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
        plain = piece.replace(_NEWLINE, "\n").replace(_SPACE, " ").replace(_ESCAPE, "")
        return len(plain.encode("utf-8")) + _ESCAPED_BYTES * piece.count(_ESCAPE)


def open_tokenizer(config: DataConfig) -> Tokenizer:
    """The configured tokenizer, trained first where it has to be.

    A trained model is cached under the data directory, under a name that depends on the training
    documents and on every setting.

    Args:
        config: The data config.

    Returns:
        The tokenizer, with sentinels if spans are cut out.

    Raises:
        FileNotFoundError: `sentencepiece:PATH` names no file, or the source is missing.
        ValueError: Unknown tokenizer, or too small a vocabulary.
    """
    check_tokenizer(config)
    base = _open_base(config)
    return base if config.spans is None else WithSentinels(base, config.spans.sentinels)


def _open_base(config: DataConfig) -> Tokenizer:
    if is_hf(config.tokenizer):
        return open_hf(config.tokenizer, config.spans.sentinels if config.spans else 0)
    if config.tokenizer == "bytes":
        return Bytes()
    if config.tokenizer.startswith(_MODEL_PREFIX):
        return _read_model(_model_path(config), "choose another data.tokenizer")
    source = open_source(config, "train")
    cached = _cache_path(config, source)
    if not cached.is_file():
        write_parts(cached, [train_sentencepiece(source, config.vocab_size).model])
    return _read_model(cached, "delete it, and it is trained again")


def _model_path(config: DataConfig) -> tfds.core.Path:
    return tfds.core.Path(config.tokenizer.removeprefix(_MODEL_PREFIX)).expanduser()


def _read_model(path: tfds.core.Path, remedy: str) -> SentencePiece:
    """A model file that this package trained; ConfigError, with the remedy, if it is not one."""
    try:
        return SentencePiece(path.read_bytes())
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"{path} cannot serve as tokenizer ({line_of(error)}): {remedy}"
        ) from error


def check_tokenizer(config: DataConfig) -> None:
    """Raises what `open_tokenizer` would raise early, without training.

    Args:
        config: The data config.

    Raises:
        FileNotFoundError: `sentencepiece:PATH` names no file.
        ConfigError: That file is no model of this package.
        ValueError: Unknown tokenizer or too small a vocabulary.
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
    """Whether two tokenizers give every text the same ids."""
    return _content(one) == _content(other)


def identity_of(tokenizer: Tokenizer) -> str:
    """Names the ids that a tokenizer gives to texts, whatever sentinels it adds."""
    model, _ = _content(tokenizer)
    return "bytes" if model is None else hashlib.sha256(model).hexdigest()


def contradiction(config: DataConfig, trained: DataConfig, tokenizer: Tokenizer) -> str:
    """Says what speaks against the tokenizer of another run.

    Args:
        config: The data config that asks for a tokenizer.
        trained: That of the other run.
        tokenizer: The other run's.

    Returns:
        What differs and what to change, or "" where nothing does.

    Raises:
        FileNotFoundError: `sentencepiece:PATH` names no file.
    """
    model, sentinels = _content(tokenizer)
    wanted = config.spans.sentinels if config.spans else 0
    if wanted != sentinels:
        return f"{sentinels} sentinels there and {wanted} here; set data.spans as there"
    base = _base(tokenizer)
    bytes_differ = (config.tokenizer == "bytes") != (model is None)
    if bytes_differ or is_hf(config.tokenizer) != isinstance(base, HFTokenizer):
        return f"data.tokenizer={config.tokenizer!r} here; set it to {trained.tokenizer!r}"
    if is_hf(config.tokenizer) and _content(_open_base(config))[0] != model:
        return (
            f"data.tokenizer={config.tokenizer!r} is another one; set it to {trained.tokenizer!r}"
        )
    if config.tokenizer.startswith(_MODEL_PREFIX) and _content(_open_base(config))[0] != model:
        return f"data.tokenizer={config.tokenizer!r} is another model; set it to 'sentencepiece'"
    sizes = (trained.vocab_size, base.vocab_size)
    if config.tokenizer == "sentencepiece" and config.vocab_size not in sizes:
        return f"data.vocab_size={config.vocab_size} here; set it to {sizes[0]}"
    return ""


def _content(tokenizer: Tokenizer) -> tuple[bytes | None, int]:
    """The model, None for bytes, and the number of sentinels."""
    base, outer = _base(tokenizer), without_spare_ids(tokenizer)
    sentinels = outer.sentinels if isinstance(outer, WithSentinels) else 0
    return base.model if isinstance(base, SentencePiece | HFTokenizer) else None, sentinels


def _base(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer below sentinels and spare ids."""
    outer = without_spare_ids(tokenizer)
    return outer.base if isinstance(outer, WithSentinels) else outer


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Reads the tokenizer that `Tokenizer.save` wrote into `directory`, spare ids included.

    Raises:
        FileNotFoundError: `directory` holds no tokenizer.
    """
    released = load_hf(directory)
    if released is None:
        return load_spare_ids(directory, _load_own(directory))
    return load_spare_ids(directory, load_sentinels(directory, released))


def _load_own(directory: str | Path) -> Tokenizer:
    """Reads the tokenizer that `Tokenizer.save` wrote into `directory`.

    Args:
        directory: Such as a run's working directory.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: `directory` holds no tokenizer.
        ConfigError: Its tokenizer is damaged.
    """
    directory = tfds.core.Path(directory)
    if (directory / _MODEL_FILE).is_file():
        model = _read_model(directory / _MODEL_FILE, _RESTORE)
        return load_sentinels(directory, model)
    if (directory / _BYTES_FILE).is_file():
        return load_sentinels(directory, Bytes())
    raise FileNotFoundError(
        f"{directory} holds no {_MODEL_FILE} and no {_BYTES_FILE}; give a run's working directory."
    )


def train_sentencepiece(source: Source, vocab_size: int) -> SentencePiece:
    """Trains a byte-pair model (Sennrich et al., 2016) whose tokens may span spaces and lines.

    Args:
        source: Training documents; an even sample of about 16 MB is used of a larger corpus.
        vocab_size: Tokens wanted, specials and the 256 bytes included.

    Returns:
        The model, with fewer tokens where the corpus has no more pairs to merge; the same
        documents always give the same bytes.

    Raises:
        ValueError: The vocabulary is too small for the specials, bytes and characters needed.
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
    """Pieces of an even sample of the documents, escaped."""
    # A few documents tell the corpus's size well enough to choose the stride.
    probe = range(0, len(source), max(1, len(source) // 64))
    mean_bytes = sum(len(source[i].encode("utf-8")) for i in probe) / len(probe)
    wanted = max(1, round(_TRAINING_BYTES / max(1.0, mean_bytes)))
    left = 2 * _TRAINING_BYTES
    for index in range(0, len(source), max(1, len(source) // wanted)):
        text = _escape(source[index])[:left]
        left -= len(text)
        for start in range(0, len(text), _SENTENCE_CHARACTERS):
            yield text[start : start + _SENTENCE_CHARACTERS]


def _escape(text: str) -> str:
    for character, letter in _ESCAPES.items():
        text = text.replace(character, _ESCAPE + letter)
    return text.replace("\n", _NEWLINE)


def _unescape(text: str) -> str:
    text = text.replace(_NEWLINE, "\n")
    first, *rest = text.split(_ESCAPE)
    restored = {letter: character for character, letter in _ESCAPES.items()}
    return first + "".join(restored.get(part[:1], part[:1]) + part[1:] for part in rest)


def _cache_path(config: DataConfig, source: Source) -> tfds.core.Path:
    settings = [source.identity, config.text_feature, config.vocab_size, _TRAINER, _TRAINING_BYTES]
    key = json.dumps([*settings, spm.__version__]).encode()
    name = f"sentencepiece_{config.vocab_size}_{hashlib.sha256(key).hexdigest()[:16]}.model"
    return data_directory(config) / "tokenizers" / name
