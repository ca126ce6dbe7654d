"""Prepared TFDS datasets; the dataset ``python_library`` is prepared on first use."""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader
from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError
from tensorflow_datasets.core import read_only_builder

from moe_jax.data import python_library
from moe_jax.data.config import DataConfig
from moe_jax.data.directory import data_directory, unwritable
from moe_jax.errors import ConfigError, line_of

PYTHON_LIBRARY = "python_library"
_ARRAY_RECORD = tfds.core.FileFormat.ARRAY_RECORD
_METADATA = ("dataset_info.json", "features.json")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
# Exceptions of a damaged record: in its file, its layout, its features or its text.
_DAMAGE = (RuntimeError, IndexError, DecodeError, KeyError, ValueError)


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """One text feature of a prepared TFDS dataset.

    Attributes:
        records: TFDS data source of the split.
        text_feature: Name of the text feature.
        identity: Name of dataset, version and split.
        size: Number of bytes of the dataset, other splits and features included.
        shards: Path and number of records of each file, in order.
    """

    records: Sequence[dict[str, Any]]
    text_feature: str
    identity: str
    size: int
    shards: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self.records)

    def __getitem__(self, index: int) -> str:
        """Returns the text of document ``index``.

        Raises:
            ConfigError: The record is damaged; the message names its file.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        try:
            return self.records[index][self.text_feature].decode("utf-8")
        except _DAMAGE as error:
            raise damaged(self._shard(index), line_of(error)) from error

    def domain(self, index: int) -> int:
        """Returns 0, since text datasets have no domains."""
        del index
        return 0

    def _shard(self, index: int) -> str:
        for path, records in self.shards:
            if index < records:
                return path
            index -= records
        raise IndexError(index)


def damaged(path: str | tfds.core.Path, reason: str) -> ConfigError:
    """Returns the error for a damaged file of a prepared dataset."""
    folder = tfds.core.Path(path).parent
    return ConfigError(
        f"{path} is damaged ({reason}): delete {folder} and prepare the dataset again, which for "
        f"data.source={PYTHON_LIBRARY!r} happens by itself"
    )


def open_prepared(config: DataConfig, validation: bool) -> TfdsSource:
    """Opens one split of a prepared dataset; ``python_library`` is prepared if it is missing.

    Raises:
        FileNotFoundError: The dataset is not prepared.
        ConfigError: A file of the dataset is damaged.
        ValueError: Dataset, split or text feature does not exist, or the split is empty.
    """
    setting = "eval_split" if validation else "train_split"
    expression = getattr(config, setting)
    with _quiet():
        builder = _prepared_builder(config)
        _check_format(builder)
        _check_feature(config, builder)
        try:
            files = builder.info.splits[expression].file_instructions
            records = builder.as_data_source(expression)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{builder.info.full_name} has no split {expression!r}; it has "
                f"{sorted(builder.info.splits)} (set data.{setting})."
            ) from error
    if not files:
        raise ValueError(
            f"split {expression!r} of {builder.info.full_name} is empty; set data.{setting}."
        )
    for file in files:
        _check_shard(str(file.filename), file.examples_in_shard)
    shards = tuple((str(file.filename), file.take) for file in files)
    feature = "" if config.text_feature == "text" else f"/{config.text_feature}"
    identity = f"{builder.info.full_name}/{expression}{feature}"
    return TfdsSource(
        records, config.text_feature, identity, int(builder.info.dataset_size), shards
    )


def library_is_prepared(config: DataConfig) -> bool:
    """Returns whether the library of this interpreter version is prepared."""
    return _library_folder(config).exists()


def prepare(builder: tfds.core.DatasetBuilder) -> None:
    """Prepares a dataset that needs no download, with the progress bar of TFDS.

    Args:
        builder: Builder of the dataset; the files appear under ``builder.data_path`` all at once,
            when they are complete.

    Raises:
        ConfigError: The data directory cannot be written.
    """
    # TFDS announces a download on stdout; nothing is downloaded here.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False, num_shards=1)
            )
        except OSError as error:
            # Another process may have prepared the same dataset first; its files are as good.
            if not builder.data_path.exists():
                raise unwritable(builder.data_path, error) from error


@functools.cache
def _check_shard(path: str, records: int) -> None:
    """Raises ConfigError unless the file holds ``records`` records."""
    try:
        reader = ArrayRecordReader(path)
        count = reader.num_records()
        reader.close()
    except _DAMAGE as error:
        raise damaged(path, line_of(error)) from error
    if count != records:
        raise damaged(path, f"it has {count} records and not {records}")


def _library_folder(config: DataConfig) -> tfds.core.Path:
    builder = python_library.Builder
    (name,) = (known.name for known in builder.BUILDER_CONFIGS)
    return data_directory(config) / PYTHON_LIBRARY / name / str(builder.VERSION)


def _library_builder(config: DataConfig) -> tfds.core.DatasetBuilder:
    return python_library.Builder(
        data_dir=str(data_directory(config)), file_format=_ARRAY_RECORD.value
    )


def _prepared_builder(config: DataConfig) -> tfds.core.DatasetBuilder:
    if config.source == PYTHON_LIBRARY:
        if not library_is_prepared(config):
            prepare(_library_builder(config))
        _check_metadata(_library_folder(config))
        return _opened(_library_builder, config)
    for folder in _version_folders(config):
        _check_metadata(folder)
    return _opened(_builder_by_name, config)


def _builder_by_name(config: DataConfig) -> tfds.core.DatasetBuilder:
    try:
        return read_only_builder.builder_from_files(
            config.source, data_dir=str(data_directory(config))
        )
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise _not_prepared(config) from error


def _opened(
    make: Callable[[DataConfig], tfds.core.DatasetBuilder], config: DataConfig
) -> tfds.core.DatasetBuilder:
    """Returns the builder of ``make``; rejects metadata that TFDS cannot read."""
    try:
        return make(config)
    except (ParseError, KeyError, AttributeError, TypeError) as error:
        where = data_directory(config) / config.source
        raise ConfigError(
            f"TFDS cannot read the dataset in {where} ({line_of(error)}): delete the folder and "
            "prepare the dataset again"
        ) from error


def _version_folders(config: DataConfig) -> list[tfds.core.Path]:
    """Returns the folders of all prepared versions that match the name of the source."""
    root = data_directory(config).joinpath(*re.split("[/:]", config.source))
    folders = [root, *root.glob("*"), *root.glob("*/*")] if root.is_dir() else []
    return [folder for folder in folders if _VERSION.fullmatch(folder.name) and folder.is_dir()]


def _check_metadata(folder: tfds.core.Path) -> None:
    """Raises ConfigError unless the metadata files of a dataset exist and are JSON."""
    for name in _METADATA:
        path = folder / name
        try:
            json.loads(path.read_text())
        except FileNotFoundError as error:
            raise ConfigError(
                f"{path} is missing, so the dataset is incomplete: delete {folder} and prepare it "
                f"again, which for data.source={PYTHON_LIBRARY!r} happens by itself"
            ) from error
        except ValueError as error:
            raise damaged(path, line_of(error)) from error


def _not_prepared(config: DataConfig) -> Exception:
    # TFDS imports its text datasets lazily, so it knows their names only after this import.
    importlib.import_module("tensorflow_datasets.text")
    known = tfds.list_builders(with_community_datasets=False)
    name = config.source.split("/")[0].split(":")[0]
    if name not in known:
        path = Path(config.source)
        if path.exists():
            what = "a folder" if path.is_dir() else "a file"
            glob = (path / "**/*.txt" if path.is_dir() else path).as_posix()
            return ValueError(
                f"data.source {config.source!r} names no dataset, and {path.as_posix()!r} is "
                f"{what}: use files:{glob}"
            )
        choices = sorted({*known, PYTHON_LIBRARY, "mixture"})
        near = ", ".join(difflib.get_close_matches(name, choices, n=3)) or "none"
        return ValueError(
            f"data.source {config.source!r} is unknown: it is not a TFDS dataset (nearest: {near}),"
            " python_library, mixture, files:GLOB or hf:NAME."
        )
    directory = data_directory(config)
    return FileNotFoundError(
        f"TFDS dataset {config.source!r} is not prepared in {directory}; run `tfds build "
        f"{config.source} --file_format=array_record --data_dir={directory}` where TensorFlow is "
        "installed, or set data.data_dir."
    )


def _check_format(builder: tfds.core.DatasetBuilder) -> None:
    formats = builder.info.available_file_formats()
    if _ARRAY_RECORD not in formats:
        names = ", ".join(sorted(item.value for item in formats)) or "nothing"
        raise ValueError(
            f"{builder.info.full_name} is prepared as {names}, which has no random access; run "
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
    """Hides the warnings of TFDS about missing metadata."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
