"""Documents by index, from TFDS, local files or the synthetic mixture."""

import contextlib
import dataclasses
import difflib
import functools
import glob
import hashlib
import importlib
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core import constants, read_only_builder

from moe_jax.data import python_library
from moe_jax.data.config import DataConfig
from moe_jax.data.mixture import MixtureSource
from moe_jax.data.python_library.python_library_dataset_builder import is_validation

Split = Literal["train", "eval"]

_FILES = "files:"
_PYTHON_LIBRARY = "python_library"
_ARRAY_RECORD = tfds.core.FileFormat.ARRAY_RECORD


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
    elif config.source.startswith(_FILES):
        source = _open_files(config, split)
    else:
        source = _open_tfds(config, split)
    if len(source) == 0:
        raise ValueError(f"the {split} split of source {config.source!r} holds no document.")
    if split == "eval" and config.eval_documents is not None:
        return FirstDocuments(source, config.eval_documents)
    return source


def check_source(config: DataConfig) -> None:
    """Raises what `open_source` would raise, without preparing or reading documents.

    Args:
        config: The data config. A `python_library` that is not prepared yet passes.

    Raises:
        FileNotFoundError: As `open_source`.
        ValueError: As `open_source`.
    """
    if config.source == _PYTHON_LIBRARY and not _library_builder(config).data_path.exists():
        return
    open_source(config, "train")
    open_source(config, "eval")


def data_directory(config: DataConfig) -> tfds.core.Path:
    """Where prepared datasets and trained tokenizers are kept."""
    return tfds.core.Path(config.data_dir or constants.DATA_DIR).expanduser()


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
        """The text of document `index`; ValueError where the file is not UTF-8."""
        try:
            return Path(self.paths[index]).read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.paths[index]} is not UTF-8 text; convert it or narrow the glob."
            ) from error

    def domain(self, index: int) -> int:
        """Files have no domains: 0."""
        del index
        return 0


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """One text feature of a prepared TFDS dataset.

    Attributes:
        records: The TFDS data source.
        text_feature: Name of the feature.
        identity: Dataset, version and split.
        size: Bytes of the dataset, other splits and features included.
    """

    records: Sequence[dict[str, Any]]
    text_feature: str
    identity: str
    size: int

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.records)

    def __getitem__(self, index: int) -> str:
        """The text of document `index`."""
        return self.records[index][self.text_feature].decode("utf-8")

    def domain(self, index: int) -> int:
        """Text datasets have no domains: 0."""
        del index
        return 0


def _open_files(config: DataConfig, split: Split) -> FileSource:
    pattern = config.source.removeprefix(_FILES)
    expanded = os.path.expanduser(pattern)
    paths = sorted(path for path in glob.iglob(expanded, recursive=True) if os.path.isfile(path))
    if not paths:
        raise FileNotFoundError(f"no file matches {pattern!r}; correct the glob in data.source.")
    # Hashing the path below the glob's fixed part keeps the split when the corpus is moved.
    root = _fixed_part(expanded)
    wanted = split == "eval"
    chosen = tuple(p for p in paths if is_validation(os.path.relpath(p, root)) == wanted)
    if not chosen:
        raise ValueError(
            f"the {split} split of {pattern!r} is empty: {len(paths)} file(s) match and about 5 % "
            "are for validation; give more files."
        )
    return FileSource(chosen)


def _fixed_part(pattern: str) -> Path:
    """The directories of a glob that come before its first wildcard."""
    directories = Path(pattern).parent.parts
    return Path(*itertools.takewhile(lambda part: glob.escape(part) == part, directories))


def _open_tfds(config: DataConfig, split: Split) -> TfdsSource:
    with _quiet():
        builder = _prepared_builder(config)
        _check_format(config, builder)
        _check_feature(config, builder)
        expression = config.train_split if split == "train" else config.eval_split
        try:
            records = builder.as_data_source(expression)
            length = len(records)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{builder.info.full_name} has no split {expression!r}; it has "
                f"{sorted(builder.info.splits)} (set data.{split}_split)."
            ) from error
    if length == 0:
        raise ValueError(
            f"split {expression!r} of {builder.info.full_name} is empty; set data.{split}_split."
        )
    identity = f"{builder.info.full_name}/{expression}"
    return TfdsSource(records, config.text_feature, identity, int(builder.info.dataset_size))


def _library_builder(config: DataConfig) -> tfds.core.DatasetBuilder:
    return python_library.Builder(
        data_dir=str(data_directory(config)), file_format=_ARRAY_RECORD.value
    )


def _prepared_builder(config: DataConfig) -> tfds.core.DatasetBuilder:
    if config.source == _PYTHON_LIBRARY:
        builder = _library_builder(config)
        if builder.data_path.exists():
            return builder
        prepare(builder)
        return _library_builder(config)
    try:
        return read_only_builder.builder_from_files(
            config.source, data_dir=str(data_directory(config))
        )
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise _not_prepared(config) from error


def prepare(builder: tfds.core.DatasetBuilder) -> None:
    """Prepares a dataset that needs no download, with TFDS's progress bar.

    Args:
        builder: Its files appear under `builder.data_path` all at once, when they are complete.
    """
    # TFDS announces a download on stdout; nothing is downloaded here.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False, num_shards=1)
            )
        except OSError:
            # Another process may have finished the same dataset first; that one is as good.
            if not builder.data_path.exists():
                raise


def _not_prepared(config: DataConfig) -> Exception:
    # TFDS imports its text datasets lazily, so their names are unknown before this.
    importlib.import_module("tensorflow_datasets.text")
    known = tfds.list_builders(with_community_datasets=False)
    name = config.source.split("/")[0].split(":")[0]
    if name not in known:
        choices = sorted({*known, _PYTHON_LIBRARY, "mixture"})
        near = ", ".join(difflib.get_close_matches(name, choices, n=3)) or "none"
        return ValueError(
            f"data.source {config.source!r} is unknown: it is not a TFDS dataset (nearest: {near}),"
            " python_library, mixture or files:GLOB."
        )
    directory = data_directory(config)
    return FileNotFoundError(
        f"TFDS dataset {config.source!r} is not prepared in {directory}; run `tfds build "
        f"{config.source} --file_format=array_record --data_dir={directory}` where TensorFlow is "
        "installed, or set data.data_dir."
    )


def _check_format(config: DataConfig, builder: tfds.core.DatasetBuilder) -> None:
    formats = builder.info.available_file_formats()
    if _ARRAY_RECORD not in formats:
        found = ", ".join(sorted(item.value for item in formats)) or "nothing"
        raise ValueError(
            f"{builder.info.full_name} is prepared as {found}, which has no random access; run "
            f"`tfds convert_format --dataset_dir={builder.data_path} "
            "--out_file_format=array_record`."
        )


def _check_feature(config: DataConfig, builder: tfds.core.DatasetBuilder) -> None:
    features = builder.info.features
    texts = [name for name, item in features.items() if isinstance(item, tfds.features.Text)]
    if config.text_feature not in texts:
        raise ValueError(
            f"{builder.info.full_name} has no text feature {config.text_feature!r}; it has "
            f"{sorted(texts)} of {sorted(features)} (set data.text_feature)."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS's warnings about missing metadata off the terminal."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
