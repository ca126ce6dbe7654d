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
# Bytes of text that are read whole: to be hashed, and to be shuffled by an index.
LARGEST = 4 << 30


class Source(Protocol):
    """Documents with random access.

    Attributes:
        identity: Names the documents; two sources with one identity hold the same text.
        size: Bytes of all documents, about.
    """

    identity: str
    size: int

    def __len__(self) -> int:
        """Number of documents."""
        ...

    def __getitem__(self, index: int) -> str:
        """The text of document `index`, 0 <= index < len."""
        ...

    def domain(self, index: int) -> int:
        """The language or topic of document `index`; 0 where the corpus has none."""
        ...


def open_source(config: DataConfig, split: Split) -> Source:
    """Opens one split of the configured corpus.

    `python_library` is prepared when it is missing (a few seconds). No other dataset is ever
    downloaded.

    Args:
        config: The data config; `eval_documents` limits the split `eval`.
        split: `train` or `eval`.

    Returns:
        The documents.

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
    """Raises what `open_source` would raise, without preparing a dataset.

    Files are read, and of a prepared dataset the metadata and the ends of its shards.

    Args:
        config: The data config. A `python_library` that is not prepared yet passes.

    Raises:
        FileNotFoundError: As `open_source`.
        ConfigError: A file is damaged, is no text, or is where a folder should be.
        ValueError: As `open_source`.
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
    """What a corpus holds.

    Attributes:
        training: Training documents.
        validation: Validation documents.
        sha256: Of the text of all of them; of a corpus of more than 4 GB, of its outline.
    """

    training: int
    validation: int
    sha256: str


def read_contents(config: DataConfig) -> Contents:
    """Reads every document of both splits once; prepares `python_library` if it is missing.

    Raises:
        FileNotFoundError: As `open_source`.
        ConfigError: A file is damaged or is no text.
        ValueError: As `open_source`.
    """
    training, validation = open_source(config, "train"), open_source(config, "eval")
    digest = hashlib.sha256()
    for source in (training, validation):
        digest.update(_fingerprint(source))
    return Contents(len(training), len(validation), digest.hexdigest())


def _fingerprint(source: Source) -> bytes:
    """The SHA-256 of a source's documents in order, or of what names them."""
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
        source: All documents.
        limit: How many to keep at most.
    """

    source: Source
    limit: int

    @property
    def identity(self) -> str:
        """Names the documents."""
        return f"{self.source.identity}[:{self.limit}]"

    @property
    def size(self) -> int:
        """Bytes of the whole source, of which these are a part."""
        return self.source.size

    def __len__(self) -> int:
        """Number of documents."""
        return min(self.limit, len(self.source))

    def __getitem__(self, index: int) -> str:
        """The text of document `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self.source[index]

    def domain(self, index: int) -> int:
        """As the whole source."""
        return self.source.domain(index)
