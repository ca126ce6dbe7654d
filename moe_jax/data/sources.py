"""Documents by index, from TFDS, local files or the synthetic mixture."""

import dataclasses
import hashlib
from typing import Literal, Protocol

from moe_jax.data.config import DataConfig
from moe_jax.data.directory import check_directory
from moe_jax.data.files import PREFIX, check_files, open_files
from moe_jax.data.mixture import MixtureSource
from moe_jax.data.prepared import PYTHON_LIBRARY, library_is_prepared, open_prepared

Split = Literal["train", "eval"]
# Largest corpus, in bytes of text, that is hashed whole or shuffled by an index.
LARGEST = 4 << 30


class Source(Protocol):
    """Documents with random access."""

    @property
    def identity(self) -> str:
        """Identity of the documents; two sources with one identity hold the same text."""
        ...

    @property
    def size(self) -> int:
        """Approximate number of bytes of all documents."""
        ...

    def __len__(self) -> int:
        """Returns the number of documents."""
        ...

    def __getitem__(self, index: int) -> str:
        """Returns the text of document ``index``, 0 <= index < len."""
        ...

    def domain(self, index: int) -> int:
        """Returns the language or topic of document ``index``; 0 if the corpus has none."""
        ...


def open_source(config: DataConfig, split: Split) -> Source:
    """Opens one split of the configured corpus.

    ``python_library`` is prepared if it is missing (a few seconds). Nothing is ever downloaded.

    Args:
        config: The data config; ``eval_documents`` limits the split ``eval``.
        split: Split to open, ``train`` or ``eval``.

    Returns:
        Source of the documents of the split.

    Raises:
        FileNotFoundError: No file matches the glob, or the TFDS dataset is not prepared.
        ValueError: The TFDS dataset, split or text feature does not exist, or the split is empty.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', got {split!r}.")
    if config.source == "mixture":
        source: Source = MixtureSource(config.mixture, split)
    elif config.source.startswith(PREFIX):
        source = open_files(config, validation=split == "eval")
    else:
        source = open_prepared(config, validation=split == "eval")
    if len(source) == 0:
        raise ValueError(f"the {split} split of source {config.source!r} holds no document.")
    if split == "eval" and config.eval_documents is not None:
        return FirstDocuments(source, config.eval_documents)
    return source


def check_source(config: DataConfig) -> None:
    """Raises the errors of ``open_source`` without preparing a dataset.

    The check reads all text files, or the metadata and the footers of the shards of a prepared
    dataset.

    Args:
        config: The data config. A ``python_library`` that is not prepared yet passes.

    Raises:
        FileNotFoundError: See ``open_source``.
        ConfigError: A file is damaged or not text, or ``data.data_dir`` is a file.
        ValueError: See ``open_source``.
    """
    check_directory(config)
    if config.source == PYTHON_LIBRARY and not library_is_prepared(config):
        return
    if config.source.startswith(PREFIX):
        check_files(config)
    open_source(config, "train")
    open_source(config, "eval")


@dataclasses.dataclass(frozen=True)
class Contents:
    """Size and hash of a corpus.

    Attributes:
        training: Number of training documents.
        validation: Number of validation documents.
        sha256: SHA-256 of the text of all documents; above 4 GB, of their number and size.
    """

    training: int
    validation: int
    sha256: str


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


@dataclasses.dataclass(frozen=True)
class FirstDocuments:
    """The first documents of a source.

    Attributes:
        source: Source of all documents.
        limit: Maximum number of documents.
    """

    source: Source
    limit: int

    @property
    def identity(self) -> str:
        """Identity of the documents."""
        return f"{self.source.identity}[:{self.limit}]"

    @property
    def size(self) -> int:
        """Number of bytes of the whole source."""
        return self.source.size

    def __len__(self) -> int:
        """Returns the number of documents."""
        return min(self.limit, len(self.source))

    def __getitem__(self, index: int) -> str:
        """Returns the text of document ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self.source[index]

    def domain(self, index: int) -> int:
        """Returns the domain that the whole source gives the document."""
        return self.source.domain(index)
