"""Local text files as documents, and which of them are for validation."""

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
# One document is cut into equal spans, of which these are for validation: 5 %, spread evenly.
_SPANS = 100
_VALIDATION_SPANS = (10, 30, 50, 70, 90)


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Local UTF-8 text files, one document each, read when asked for.

    Attributes:
        paths: The files.
    """

    paths: tuple[str, ...]

    @property
    def identity(self) -> str:
        """Names the documents by path, size and time of change."""
        digest = hashlib.sha256()
        for path in self.paths:
            stat = os.stat(path)
            digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return f"files/{digest.hexdigest()}"

    @functools.cached_property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(os.path.getsize(path) for path in self.paths)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.paths)

    def __getitem__(self, index: int) -> str:
        """The text of document `index`; ConfigError where the file is not UTF-8 text."""
        return _text(self.paths[index])

    def domain(self, index: int) -> int:
        """Files have no domains: 0."""
        del index
        return 0


@dataclasses.dataclass(frozen=True)
class SpanSource:
    """One file's text in spans: every twentieth hundredth is for validation, the rest for training.

    Attributes:
        path: The file.
        validation: Whether these are the documents of validation.
    """

    path: str
    validation: bool

    @property
    def identity(self) -> str:
        """Names the documents."""
        split = "validation" if self.validation else "training"
        return f"{FileSource((self.path,)).identity}/{_SPANS} spans/{split}"

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.path.getsize(self.path)

    @functools.cached_property
    def _documents(self) -> list[str]:
        text = _text(self.path)
        if len(text) < _SPANS:
            raise ConfigError(
                f"{self.path} is the only file and has {len(text)} characters, too few to leave "
                f"some for validation: give at least {_SPANS}, or a second file"
            )
        kept = _VALIDATION_SPANS
        spans = [(n, n + 1) for n in kept]
        if not self.validation:
            spans = list(zip((0, *(n + 1 for n in kept)), (*kept, _SPANS), strict=True))
        return [text[a * len(text) // _SPANS : b * len(text) // _SPANS] for a, b in spans]

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._documents)

    def __getitem__(self, index: int) -> str:
        """The text of document `index`."""
        return self._documents[index]

    def domain(self, index: int) -> int:
        """Files have no domains: 0."""
        del index
        return 0


def open_files(config: DataConfig, validation: bool) -> FileSource | SpanSource:
    """One split of the files that match the glob; empty files are left out.

    About one file in twenty is for validation, by the hash of its path below the glob's fixed part,
    so that the split survives a move. Where that leaves one side empty, a twentieth of the files,
    and at least one, is for validation; of a single file, spans are.

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
        ConfigError: All files are empty, or some are not UTF-8 text; says how many.
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
    """The files that hold text, sorted, and the folder above all of them."""
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
    """The directories of a glob that come before its first wildcard."""
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
            f"{path} cannot be read ({error.strerror}); mend that or narrow the glob."
        ) from error
    if "\0" in text:
        raise ConfigError(f"{path} is not UTF-8 text but binary; narrow the glob.")
    return text
