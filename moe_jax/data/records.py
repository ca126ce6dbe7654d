"""Documents kept as ArrayRecord files, for random access to files that have none.

The first run that reads a file writes its documents to ``records/`` in the data directory. The name
of the kept file is a hash of what was read, so later runs find it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import grain
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from moe_jax.data.config import DataConfig
from moe_jax.data.directory import data_directory, unwritable, write_parts
from moe_jax.errors import ConfigError, line_of

_LAYOUT = "1"
_RECORDS, _ABOUT = ".array_record", ".json"


@dataclasses.dataclass(frozen=True)
class Kept:
    """A file of kept documents, which may not be written yet.

    Attributes:
        path: Path of the file.
    """

    path: tfds.core.Path

    @property
    def exists(self) -> bool:
        """Whether the file is complete."""
        return self.path.exists()

    @functools.cached_property
    def about(self) -> dict[str, int]:
        """Number of ``documents`` and of their ``bytes``."""
        path = self.path.with_suffix(_ABOUT)
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error

    def write(self, documents: Iterable[str]) -> None:
        """Writes the documents; the file appears only when it is complete.

        Raises:
            ConfigError: The folder cannot be written, or ``documents`` raises it.
        """
        temporary = self.path.parent / f"{self.path.name}.{uuid.uuid4().hex}.tmp"
        about = {"documents": 0, "bytes": 0}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _write(temporary, _counted(documents, about))
            write_parts(self.path.with_suffix(_ABOUT), [json.dumps(about).encode()])
            temporary.replace(self.path)
        except (OSError, RuntimeError) as error:
            raise unwritable(self.path, OSError(line_of(error))) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _damaged(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"{self.path} is damaged ({line_of(error)}): delete it, and the next run writes it "
            "again"
        )


def kept(config: DataConfig, *identity: Any) -> Kept:
    """Returns the file of the documents with an identity, in the data directory."""
    key = "\0".join(map(str, (_LAYOUT, *identity)))
    name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return Kept(data_directory(config) / "records" / f"{name}{_RECORDS}")


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """The documents of kept files, in order.

    Attributes:
        files: The files, which exist.
    """

    files: tuple[Kept, ...]

    @property
    def identity(self) -> str:
        """Identity of the documents: the names of the files, which depend on what was read."""
        names = "\n".join(file.path.name for file in self.files)
        return f"records/{hashlib.sha256(names.encode()).hexdigest()}"

    @functools.cached_property
    def size(self) -> int:
        """Number of bytes of all documents."""
        return sum(file.about["bytes"] for file in self.files)

    @functools.cached_property
    def _records(self) -> Any:
        records = _opened(self.files)
        if len(records) != sum(file.about["documents"] for file in self.files):
            for file in self.files:
                left = len(_opened([file]))
                if left != file.about["documents"]:
                    raise file._damaged(ValueError(f"{left} documents are left"))
        return records

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self._records)

    def __getitem__(self, index: int) -> str:
        """Returns the text of document ``index``.

        Raises:
            ConfigError: The kept file is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        try:
            return self._records[index].decode("utf-8")
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._file_of(index)._damaged(error) from error

    def _file_of(self, index: int) -> Kept:
        for file in self.files:
            if index < file.about["documents"]:
                return file
            index -= file.about["documents"]
        raise IndexError(index)

    def domain(self, index: int) -> int:
        """Returns 0, since the documents have no domains."""
        del index
        return 0


def _opened(files: Iterable[Kept]) -> Any:
    files = list(files)
    try:
        return grain.sources.ArrayRecordDataSource([str(file.path) for file in files])
    except (RuntimeError, ValueError, OSError) as error:
        raise files[0]._damaged(error) from error


def _counted(documents: Iterable[str], about: dict[str, int]) -> Iterator[bytes]:
    # The bar appears after some seconds, and only on a terminal.
    for document in tqdm(documents, "documents", unit="", disable=None, delay=5):
        content = document.encode("utf-8")
        about["documents"] += 1
        about["bytes"] += len(content)
        yield content


def _write(path: tfds.core.Path, contents: Iterable[bytes]) -> None:
    # Groups of one record make each record readable alone.
    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        for content in contents:
            writer.write(content)
    finally:
        writer.close()
