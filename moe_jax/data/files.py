"""Local text files as documents, and their split into training and validation."""

import dataclasses
import functools
import glob
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from moe_jax.data.config import DataConfig
from moe_jax.data.python_library.python_library_dataset_builder import (
    VALIDATION_ONE_IN,
    is_validation,
)
from moe_jax.errors import ConfigError

PREFIX = "files:"
# A single file is cut into equal spans. The spans with these numbers are for validation: 5 %,
# spread evenly.
_SPANS = 100
_VALIDATION_SPANS = (10, 30, 50, 70, 90)


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Local UTF-8 text files, one document each; a file is read when its document is requested.

    Attributes:
        paths: Paths of the files.
    """

    paths: tuple[str, ...]

    @property
    def identity(self) -> str:
        """Identity of the documents: a hash of path, size and modification time of each file."""
        digest = hashlib.sha256()
        for path in self.paths:
            stat = os.stat(path)
            digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return f"files/{digest.hexdigest()}"

    @functools.cached_property
    def size(self) -> int:
        """Total bytes of all files."""
        return sum(os.path.getsize(path) for path in self.paths)

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self.paths)

    def __getitem__(self, index: int) -> str:
        """Returns the text of document ``index``.

        Raises:
            ConfigError: The file is not UTF-8 text.
        """
        return _text(self.paths[index])

    def domain(self, index: int) -> int:
        """Returns 0, since files have no domains."""
        del index
        return 0


@dataclasses.dataclass(frozen=True)
class SpanSource:
    """One file cut into a hundred spans: five for validation, the others for training.

    Attributes:
        path: Path of the file.
        validation: Whether the documents are the validation documents.
    """

    path: str
    validation: bool

    @property
    def identity(self) -> str:
        """Identity of the documents."""
        split = "validation" if self.validation else "training"
        return f"{FileSource((self.path,)).identity}/{_SPANS} spans/{split}"

    @property
    def size(self) -> int:
        """Number of bytes of the file."""
        return os.path.getsize(self.path)

    @functools.cached_property
    def _documents(self) -> list[str]:
        text = _text(self.path)
        if len(text) < _SPANS:
            raise ConfigError(
                f"{self.path} is the only file and has {len(text)} characters, too few to "
                f"split off validation text: give at least {_SPANS}, or a second file"
            )
        chosen = _VALIDATION_SPANS
        spans = [(n, n + 1) for n in chosen]
        if not self.validation:
            spans = list(zip((0, *(n + 1 for n in chosen)), (*chosen, _SPANS), strict=True))
        return [text[a * len(text) // _SPANS : b * len(text) // _SPANS] for a, b in spans]

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self._documents)

    def __getitem__(self, index: int) -> str:
        """Returns the text of document ``index``."""
        return self._documents[index]

    def domain(self, index: int) -> int:
        """Returns 0, since files have no domains."""
        del index
        return 0


def open_files(config: DataConfig, validation: bool) -> FileSource | SpanSource:
    """Opens one split of the files that match the glob; empty files are left out.

    About one file in twenty is for validation. The hash of the path below the fixed part of the
    glob selects it, so the split survives a move of the folder. If the hash leaves one split empty,
    a twentieth of the files, and at least one file, is for validation. A single file is cut into
    spans (``SpanSource``).

    Raises:
        FileNotFoundError: No file matches.
        ConfigError: All files are empty.
    """
    paths, root = _matching(config)
    if len(paths) == 1:
        return SpanSource(paths[0], validation)
    names = {path: os.path.relpath(path, root) for path in paths}
    chosen = {path for path in paths if is_validation(names[path])}
    if len(chosen) in (0, len(paths)):
        ranked = sorted(paths, key=lambda path: hashlib.sha256(os.fsencode(names[path])).digest())
        chosen = set(ranked[: max(1, len(paths) // VALIDATION_ONE_IN)])
    return FileSource(tuple(path for path in paths if (path in chosen) == validation))


def check_files(config: DataConfig) -> None:
    """Reads every file that matches the glob.

    Raises:
        FileNotFoundError: No file matches.
        ConfigError: All files are empty, or some are not UTF-8 text; the message counts them.
    """
    paths, _ = _matching(config)
    wrong = list(_wrong(paths))
    if wrong:
        raise ConfigError(
            f"{len(wrong)} of {len(paths)} files that data.source={config.source!r} matches cannot "
            f"be used, first {wrong[0]}"
        )


def _wrong(paths: list[str]) -> Iterator[ConfigError]:
    for path in paths:
        try:
            _text(path)
        except ConfigError as error:
            yield error


def _matching(config: DataConfig) -> tuple[list[str], Path]:
    """Returns the non-empty files, sorted, and the folder above all of them."""
    pattern = config.source.removeprefix(PREFIX)
    expanded = os.path.expanduser(pattern)
    paths = sorted(path for path in glob.iglob(expanded, recursive=True) if os.path.isfile(path))
    if not paths:
        raise FileNotFoundError(f"no file matches {pattern!r}; correct the glob in data.source.")
    filled = [path for path in paths if os.path.getsize(path)]
    if not filled:
        raise ConfigError(f"all {len(paths)} file(s) that {pattern!r} matches are empty")
    return filled, _fixed_part(expanded)


def _fixed_part(pattern: str) -> Path:
    """Returns the directories of a glob before its first wildcard."""
    directories = Path(pattern).parent.parts
    return Path(*itertools.takewhile(lambda part: glob.escape(part) == part, directories))


def _text(path: str) -> str:
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it or narrow the glob."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); make it readable or narrow the glob."
        ) from error
    if "\0" in text:
        raise ConfigError(f"{path} is not UTF-8 text but binary; narrow the glob.")
    return text
