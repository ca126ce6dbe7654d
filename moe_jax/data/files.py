"""Local files as documents, and their split into training and validation."""

import dataclasses
import functools
import glob
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from moe_jax.data.config import DataConfig
from moe_jax.data.formats import Fields, has_rows, rows
from moe_jax.data.python_library.python_library_dataset_builder import is_validation
from moe_jax.data.records import Kept, RecordSource, kept
from moe_jax.data.source import Source
from moe_jax.data.views import Joined, side
from moe_jax.errors import ConfigError

_PREFIX = "files:"


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


def is_files(config: DataConfig) -> bool:
    """Returns whether the source is ``files:GLOB``."""
    return config.source.startswith(_PREFIX)


def open_files(config: DataConfig, validation: bool) -> Source:
    """Opens one split of the files that match the glob; empty files are left out.

    A text file is one document. The documents of other files (``formats.has_rows``) are written to
    the data directory first, for random access.

    If all files are text files, about one file in ``data.eval_one_in`` is for validation. The hash
    of the path below the fixed part of the glob selects it, so the split survives a move of the
    folder. If the hash leaves one split empty, the same share of the files, and at least one file,
    is for validation. Rows are selected at equal distances, one in ``data.eval_one_in``. A
    single document is cut into spans (``SpanSource``).

    Raises:
        FileNotFoundError: No file matches.
        ConfigError: All files are empty, or a file cannot be used.
    """
    paths, root = _matching(config)
    if len(paths) > 1 and not any(map(has_rows, paths)):
        return FileSource(_hashed_side(paths, root, config.eval_one_in, validation))
    name = paths[0] if len(paths) == 1 else config.source
    source, divisible = open_all_files(config), not config.marks_answers
    return side(source, config.eval_one_in, validation, name, divisible=divisible)


def open_all_files(config: DataConfig) -> Source:
    """Opens the documents of all files that match the glob, as one split.

    Raises:
        FileNotFoundError: No file matches.
        ConfigError: All files are empty, or a file cannot be used.
    """
    paths, _ = _matching(config)
    plain = tuple(path for path in paths if not has_rows(path))
    files = tuple(_kept(config, path) for path in paths if has_rows(path))
    parts: list[Source] = [FileSource(plain)] if plain else []
    parts += [RecordSource(files)] if files else []
    source = parts[0] if len(parts) == 1 else Joined(tuple(parts))
    if not len(source):
        raise ConfigError(f"the files that {config.source!r} matches hold no document")
    return source


def _hashed_side(paths: list[str], root: Path, one_in: int, validation: bool) -> tuple[str, ...]:
    """Returns the text files of one side of the split."""
    names = {path: os.path.relpath(path, root) for path in paths}
    chosen = {path for path in paths if is_validation(names[path], one_in)}
    if len(chosen) in (0, len(paths)):
        ranked = sorted(paths, key=lambda path: hashlib.sha256(os.fsencode(names[path])).digest())
        chosen = set(ranked[: max(1, len(paths) // one_in)])
    return tuple(path for path in paths if (path in chosen) == validation)


def are_prepared(config: DataConfig) -> bool:
    """Returns whether the documents of all files with rows are written."""
    return all(_target(config, path).exists for path in _found(config) if has_rows(path))


def _kept(config: DataConfig, path: str) -> Kept:
    """Returns the documents of a file with rows, which the first call writes."""
    file = _target(config, path)
    if not file.exists:
        file.write(_documents(path, Fields.of(config)))
    return file


def _target(config: DataConfig, path: str) -> Kept:
    stat = os.stat(path)
    identity = (os.path.abspath(path), stat.st_size, stat.st_mtime_ns, Fields.of(config))
    return kept(config, *identity)


def _documents(path: str, fields: Fields) -> Iterator[str]:
    """Yields the documents of a file with rows; empty ones are left out."""
    for number, row in enumerate(rows(path, fields.names), 1):
        document = fields.document(row, f"{path}, row {number}")
        if document:
            yield document


def check_files(config: DataConfig) -> None:
    """Reads every text file that matches the glob, and the first row of every other file.

    Raises:
        FileNotFoundError: No file matches.
        ConfigError: All files are empty, or some cannot be used; the message counts them.
    """
    paths, _ = _matching(config)
    wrong = list(_wrong(config, paths))
    if wrong:
        raise ConfigError(
            f"{len(wrong)} of {len(paths)} files that {config.source!r} matches cannot be used, "
            f"first {wrong[0]}"
        )


def empty_files(config: DataConfig) -> list[str]:
    """Returns the files that match the glob and hold nothing, which are left out."""
    found = _found(config) if is_files(config) else []
    return [path for path in found if not os.path.getsize(path)]


def _wrong(config: DataConfig, paths: list[str]) -> Iterator[ConfigError]:
    for path in paths:
        try:
            if has_rows(path):
                next(_documents(path, Fields.of(config)), None)
            else:
                _text(path)
        except ConfigError as error:
            yield error


def _found(config: DataConfig) -> list[str]:
    """Returns the files that match the glob, sorted."""
    pattern = _pattern(config)
    return sorted(path for path in glob.iglob(pattern, recursive=True) if os.path.isfile(path))


def _pattern(config: DataConfig) -> str:
    return os.path.expanduser(config.source.removeprefix(_PREFIX))


def _matching(config: DataConfig) -> tuple[list[str], Path]:
    """Returns the non-empty files, sorted, and the folder above all of them."""
    pattern, paths = _pattern(config), _found(config)
    if not paths:
        raise FileNotFoundError(f"no file matches {pattern!r}; correct the glob in data.source.")
    filled = [path for path in paths if os.path.getsize(path)]
    plain = [path for path in filled if not has_rows(path)]
    if plain and config.marks_answers:
        raise ConfigError(
            f"{plain[0]} has no fields for prompts and answers: use .jsonl or .parquet files"
        )
    if not filled:
        raise ConfigError(f"all {len(paths)} file(s) that {pattern!r} matches are empty")
    return filled, _fixed_part(pattern)


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
