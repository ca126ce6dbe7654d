"""Files of the data directory, written whole or not at all."""

import uuid
from collections.abc import Iterable

import tensorflow_datasets as tfds

from moe_jax.errors import ConfigError


def write_parts(path: tfds.core.Path, parts: Iterable[bytes]) -> None:
    """Writes `parts` one after the other; `path` appears when it is complete.

    Raises:
        ConfigError: The folder cannot be written.
    """
    temporary = path.parent / f"{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(temporary, parts)
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror or error}): set data.data_dir to a folder "
            "that can"
        ) from error


def _write(path: tfds.core.Path, parts: Iterable[bytes]) -> None:
    try:
        with path.open("wb") as file:
            for part in parts:
                file.write(part)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
