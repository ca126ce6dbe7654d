"""Documents by index, from TFDS, local files, ``datasets`` or the synthetic mixture."""

import dataclasses
import hashlib
from typing import Literal

from moe_jax.data import files, hub
from moe_jax.data.config import BLEND, DataConfig
from moe_jax.data.directory import check_directory
from moe_jax.data.mixture import MixtureSource
from moe_jax.data.prepared import PYTHON_LIBRARY, library_is_prepared, open_prepared
from moe_jax.data.source import Source
from moe_jax.data.views import FirstDocuments, Joined, SpanSource

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")
# Largest corpus, in bytes of text, that is hashed whole or shuffled by an index.
LARGEST = 4 << 30


def open_source(config: DataConfig, split: Split) -> Source:
    """Opens one split of the configured corpus.

    ``python_library`` is prepared if it is missing (a few seconds). The documents of files with
    many, and of datasets of Hugging Face, are written to the data directory if they are missing.
    Only ``hf:NAME`` reads from a network.

    Args:
        config: The data config; ``eval_documents`` limits the split ``eval``.
        split: Split to open, ``train`` or ``eval``.

    Returns:
        Source of the documents of the split. In a blend, the domain of a document is the number of
        its part, from 0.

    Raises:
        FileNotFoundError: No file matches the glob, or the TFDS dataset is not prepared.
        ValueError: The TFDS dataset, split or text feature does not exist, or the split is empty.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'eval', got {split!r}.")
    if config.source == BLEND:
        parts = tuple(open_source(part, split) for part in config.parts.values())
        return Joined(parts, numbered=True)
    source = _open(config, split)
    if len(source) == 0:
        raise ValueError(f"the {split} split of source {config.source!r} holds no document.")
    limit = config.train_documents if split == "train" else config.eval_documents
    return source if limit is None else FirstDocuments(source, limit)


def _open(config: DataConfig, split: Split) -> Source:
    validation = split == "eval"
    if validation and config.eval_source:
        config = _of_validation(config)
    if config.source == "mixture":
        return MixtureSource(config.mixture, split)
    if files.is_files(config):
        whole = bool(config.eval_source)
        return files.open_all_files(config) if whole else files.open_files(config, validation)
    if hub.is_hub(config):
        return hub.open_hub(config, validation)
    return open_prepared(config, validation)


def _of_validation(config: DataConfig) -> DataConfig:
    """Returns a config whose source is ``eval_source``."""
    return dataclasses.replace(config, source=config.eval_source)


def check_source(config: DataConfig) -> None:
    """Raises the errors of ``open_source`` without preparing a dataset.

    The check reads all text files, the first row of files with many documents and of a dataset of
    Hugging Face, or the metadata and the footers of the shards of a prepared dataset.

    Args:
        config: The data config. A ``python_library`` that is not prepared yet passes.

    Raises:
        FileNotFoundError: See ``open_source``.
        ConfigError: A file is damaged or not text, or ``data.data_dir`` is a file.
        ValueError: See ``open_source``.
    """
    check_directory(config)
    for part in config.parts.values():
        _check_part(part)


def _check_part(config: DataConfig) -> None:
    splits = _splits(config)
    for one in dict.fromkeys(one for one, _ in splits):
        if files.is_files(one):
            files.check_files(one)
    for one, validation in splits:
        if hub.is_hub(one):
            hub.check_hub(one, validation)
    if all(_is_prepared(one, validation) for one, validation in splits):
        open_source(config, "train")
        open_source(config, "eval")


def _is_prepared(config: DataConfig, validation: bool) -> bool:
    """Returns whether a split of ``source`` can be opened without writing it first."""
    if config.source == PYTHON_LIBRARY:
        return library_is_prepared(config)
    if hub.is_hub(config):
        return hub.hub_is_prepared(config, validation)
    return not files.is_files(config) or files.are_prepared(config)


def empty_files(config: DataConfig) -> list[str]:
    """Returns the files of ``source`` and ``eval_source`` that are left out as empty."""
    splits = [one for part in config.parts.values() for one, _ in _splits(part)]
    return list(dict.fromkeys(path for one in splits for path in files.empty_files(one)))


def _splits(config: DataConfig) -> list[tuple[DataConfig, bool]]:
    """Returns a config with the ``source`` of each split, and whether it is for validation."""
    return [(config, False), (_of_validation(config) if config.eval_source else config, True)]


@dataclasses.dataclass(frozen=True)
class Contents:
    """Size and hash of a corpus.

    Attributes:
        training: Number of training documents.
        validation: Number of validation documents.
        sha256: SHA-256 of the text of all documents; above 4 GB, of their number and size.
        counted: What the two numbers count: documents, or spans of one document.
    """

    training: int
    validation: int
    sha256: str
    counted: str = "documents"

    @property
    def summary(self) -> str:
        """Numbers of documents in words, for the start of a run."""
        return (
            f"{self.training:,} {self.counted} for training, {self.validation:,} for validation, "
            f"SHA-256 {self.sha256[:12]}"
        )


def read_contents(config: DataConfig) -> Contents:
    """Reads every document of both splits once; prepares ``python_library`` if it is missing.

    Raises:
        FileNotFoundError: See ``open_source``.
        ConfigError: A file is damaged or not text.
        ValueError: See ``open_source``.
    """
    training, validation = open_source(config, "train"), open_source(config, "eval")
    digest = hashlib.sha256()
    for source in (training, validation):
        digest.update(_fingerprint(source))
    if isinstance(training, SpanSource) and isinstance(validation, SpanSource):
        counted = "spans of one document"
        return Contents(training.spans, validation.spans, digest.hexdigest(), counted)
    return Contents(len(training), len(validation), digest.hexdigest())


def _fingerprint(source: Source) -> bytes:
    """Returns the SHA-256 of all documents in order, or of their identity or size."""
    whole = source.source if isinstance(source, FirstDocuments) else source
    if isinstance(whole, MixtureSource):
        return hashlib.sha256(source.identity.encode()).digest()
    if source.size > LARGEST:
        return hashlib.sha256(f"{len(source)} documents, {source.size} bytes".encode()).digest()
    digest = hashlib.sha256()
    for index in range(len(source)):
        text = source[index].encode("utf-8")
        digest.update(len(text).to_bytes(8, "big") + text)
    return digest.digest()
