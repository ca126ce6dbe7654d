"""The data directory: its path, and atomic writes of files in it."""

import uuid
from collections.abc import Iterable

import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants

from moe_jax.data.config import DataConfig
from moe_jax.errors import ConfigError


def data_directory(config: DataConfig) -> tfds.core.Path:
    """Returns the folder of prepared datasets, trained tokenizers and token files."""
    return tfds.core.Path(config.data_dir or constants.DATA_DIR).expanduser()


def check_directory(config: DataConfig) -> None:
    """Raises ConfigError if ``data.data_dir`` is a file."""
    directory = data_directory(config)
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"data.data_dir={str(directory)!r} is a file: set it to a folder")


def unwritable(path: tfds.core.Path, error: OSError) -> ConfigError:
    """Returns the error for a data directory that cannot be written."""
    return ConfigError(
        f"{path} cannot be written ({error.strerror or error}): set data.data_dir to a folder that "
        "can be written"
    )


def write_parts(path: tfds.core.Path, parts: Iterable[bytes]) -> None:
    """Writes ``parts`` one after the other; ``path`` appears only when the file is complete.

    Raises:
        ConfigError: The folder cannot be written.
    """
    temporary = path.parent / f"{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(temporary, parts)
        temporary.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error


def _write(path: tfds.core.Path, parts: Iterable[bytes]) -> None:
    try:
        with path.open("wb") as file:
            for part in parts:
                file.write(part)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
