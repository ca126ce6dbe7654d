"""Datasets of Hugging Face, read by the optional package ``datasets``.

A split is streamed once, from a local folder, from the cache of ``datasets`` or from the Hub, and
its documents are kept in the data directory (``moe_jax.data.records``). A run then needs no
network, and its order and its position in the data are exact.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_jax.data.config import DataConfig
from moe_jax.data.formats import Fields, Row, check_fields
from moe_jax.data.records import Kept, RecordSource, kept
from moe_jax.data.source import Source
from moe_jax.data.views import side
from moe_jax.errors import ConfigError, line_of

_PREFIX = "hf:"
# A file that ``Dataset.save_to_disk`` and ``DatasetDict.save_to_disk`` write.
_SAVED = ("state.json", "dataset_dict.json")


def is_hub(config: DataConfig) -> bool:
    """Returns whether the source is ``hf:NAME[/CONFIG]``."""
    return config.source.startswith(_PREFIX)


def check_hub(config: DataConfig, validation: bool) -> None:
    """Reads the first document of a split that is not kept yet.

    Raises:
        ConfigError: The package ``datasets`` is missing, or the dataset, its split or its field
            does not exist.
    """
    if not _target(config, validation).exists:
        next(_documents(config, validation), None)


def hub_is_prepared(config: DataConfig, validation: bool) -> bool:
    """Returns whether the documents of a split are kept."""
    return _target(config, validation).exists


def open_hub(config: DataConfig, validation: bool) -> Source:
    """Opens one split; the first call reads it and keeps its documents.

    With ``data.eval_split=""``, validation takes documents of the training split, unless
    ``data.eval_source`` is set.

    Raises:
        ConfigError: See ``check_hub``; or a document is no text, or the split holds none.
    """
    file = _target(config, validation)
    if not file.exists:
        file.write(_documents(config, validation))
    source = RecordSource((file,))
    if not len(source):
        raise ConfigError(f"split {_split(config, validation)!r} of {config.source!r} is empty")
    if config.eval_split or config.eval_source:
        return source
    divisible = not config.marks_answers
    return side(source, config.eval_one_in, validation, config.source, divisible=divisible)


def _split(config: DataConfig, validation: bool) -> str:
    return (config.eval_split if validation else "") or config.train_split


def _limit(config: DataConfig, validation: bool) -> int | None:
    """Returns the number of documents to read; ``None`` for all."""
    own = validation and bool(config.eval_split or config.eval_source)
    return config.eval_documents if own else config.train_documents


def _target(config: DataConfig, validation: bool) -> Kept:
    name, part = _named(config)
    what = (name, part, _split(config, validation), _limit(config, validation))
    return kept(config, _PREFIX, *what, Fields.of(config), _local_files(name))


def _named(config: DataConfig) -> tuple[str, str | None]:
    """Returns the name of a dataset or its folder, and the name of its configuration."""
    name = os.path.expanduser(config.source.removeprefix(_PREFIX))
    if os.path.isdir(name):
        return os.path.abspath(name), None
    folder, _, part = name.rpartition("/")
    if folder and os.path.isdir(folder):
        return os.path.abspath(folder), part
    owner, _, rest = name.partition("/")
    dataset, _, part = rest.partition("/")
    return f"{owner}/{dataset}" if dataset else owner, part or None


def _local_files(name: str) -> list[tuple[str, int, int]]:
    """Returns name, size and modification time of the files in a local folder."""
    paths = sorted(path for path in Path(name).rglob("*") if path.is_file())
    stats = [(path, path.stat()) for path in paths]
    return [(str(path.relative_to(name)), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def _documents(config: DataConfig, validation: bool) -> Iterator[str]:
    """Yields the documents of a split; empty ones are left out."""
    fields, split = Fields.of(config), _split(config, validation)
    limit, count = _limit(config, validation), 0
    for number, row in enumerate(_rows(config, split), 1):
        where = f"{config.source}, row {number} of split {split!r}"
        check_fields(row, fields.names, where)
        document = fields.document(row, where)
        if document:
            yield document
            count += 1
        if count == limit:
            return


def _rows(config: DataConfig, split: str) -> Iterator[Row]:
    name, part = _named(config)
    library = _library()
    try:
        yield from _opened(library, name, part, split)
    except ConfigError:
        raise
    except Exception as error:  # The package raises errors of every library that it reads with.
        remedy = "correct the name, data.train_split or data.eval_split"
        if isinstance(error, ConnectionError):
            remedy = "read it once where there is a network, or give a local folder"
        raise ConfigError(
            f"data.source={config.source!r}, split {split!r}: {line_of(error)}; {remedy}"
        ) from error


def _opened(library: Any, name: str, part: str | None, split: str) -> Any:
    if not any((Path(name) / file).exists() for file in _SAVED):
        return library.load_dataset(name, part, split=split, streaming=True)
    saved = library.load_from_disk(name)
    if isinstance(saved, dict):
        if split not in saved:
            raise ValueError(f"there are only the splits {', '.join(sorted(saved))}")
        return saved[split]
    if str(saved.split or "train") != split:
        raise ValueError(f"there is only the split {str(saved.split or 'train')!r}")
    return saved


def _library() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            "data.source='hf:NAME' needs the package datasets: pip install datasets zstandard"
        ) from error
