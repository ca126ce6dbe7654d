"""Reads and writes tensors in safetensors files, one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_dtypes import float8_e4m3fn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_jax.errors import ConfigError, line_of
from moe_jax.interop.huggingface.packed import (
    ACTIVATION_SCALE,
    FP8_SCALE,
    MXFP4,
    from_fp8,
    from_mxfp4,
)

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class TensorFiles:
    """The tensors of a folder, each of which is read on request.

    A tensor that is stored in eight or four bits with scales appears as one tensor of float32.

    Attributes:
        names: Names of the tensors.
    """

    def __init__(self, directory: Path, tile: tuple[int, int] = (128, 128)):
        """Opens a folder.

        Args:
            directory: The folder.
            tile: Rows and columns of an eight-bit weight that share a scale.

        Raises:
            ConfigError: If the folder holds no weights, or the index names a missing file.
        """
        index = directory / _INDEX
        if index.exists():
            files = _weight_map(index)
        elif (directory / _ONE).exists():
            with self._open(directory / _ONE) as file:
                files = dict.fromkeys(file.keys(), _ONE)
        else:
            raise ConfigError(f"{directory} has neither {_ONE} nor {_INDEX}")
        lost = sorted(name for name in set(files.values()) if not (directory / name).exists())
        if lost:
            raise ConfigError(f"{directory} lacks {', '.join(lost)}, which its index names")
        self._files = {name: directory / file for name, file in files.items()}
        self._tile = tile
        blocks, scales = MXFP4
        self._packed = {
            name.removesuffix(blocks)
            for name in self._files
            if name.endswith(blocks) and name.removesuffix(blocks) + scales in self._files
        }
        halves = {name + end for name in self._packed for end in MXFP4}
        self.names = frozenset((self._files.keys() | self._packed) - self._scales() - halves)

    def _scales(self) -> set[str]:
        """Returns the names of scales of eight-bit weights, and of the activations beside them."""
        scaled = {name for name in self._files if name + FP8_SCALE in self._files}
        weights = {name + FP8_SCALE for name in scaled}
        stems = {name.removesuffix(".weight") + "." for name in scaled if name.endswith(".weight")}
        stems |= {name + "_" for name in scaled if not name.endswith(".weight")}
        return weights | {stem + ACTIVATION_SCALE for stem in stems}

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor.

        Raises:
            ConfigError: If the file lacks the tensor or is truncated, or if the dtype of the
                tensor is not a floating-point type.
        """
        try:
            if name in self._packed:
                return from_mxfp4(*(self._stored(name + end) for end in MXFP4))
            tensor = self._stored(name)
            if name + FP8_SCALE in self._files:
                return from_fp8(tensor, self._stored(name + FP8_SCALE), self._tile)
        except (ValueError, IndexError) as error:
            raise ConfigError(f"{name}: {line_of(error)}") from error
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ConfigError(
                f"{name} in {self._files[name]} has dtype {tensor.dtype}, but weights must be "
                "floating-point numbers: store it as float32, bfloat16 or float16"
            )
        return tensor

    def integers(self, name: str) -> np.ndarray:
        """Returns one tensor of integers, such as a table of token ids.

        Raises:
            ConfigError: If the file lacks the tensor or is truncated, or if it has another dtype.
        """
        tensor = self._stored(name)
        if not jnp.issubdtype(tensor.dtype, jnp.integer):
            raise ConfigError(
                f"{name} in {self._files[name]} has dtype {tensor.dtype}, but it must hold "
                "integers: store it as int32 or int64"
            )
        return tensor

    def _stored(self, name: str) -> np.ndarray:
        path = self._files[name]
        try:
            with self._open(path) as file:
                # NumPy has no eight-bit floats, so safetensors cannot return them as NumPy arrays.
                if file.get_slice(name).get_dtype() != "F8_E4M3":
                    return file.get_tensor(name)
        except SafetensorError as error:
            message = f"{path} has no tensor {name} that can be read: {line_of(error)}"
            raise ConfigError(message) from error
        except (TypeError, AttributeError) as error:
            raise ConfigError(f"{name} in {path} has a dtype that NumPy does not have") from error
        return _eight_bit(path, name)

    @staticmethod
    def _open(path: Path) -> safe_open:
        try:
            return safe_open(path, "np")
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} is not a safetensors file: {line_of(error)}") from error


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
        ConfigError: If the file cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} does not exist: give the folder of a transformers model"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {line_of(error)}") from error


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise ConfigError(f"{index} has no weight_map from tensor names to file names")
    return files


def _eight_bit(path: Path, name: str) -> np.ndarray:
    """Reads a tensor of float8_e4m3fn.

    The file holds the length of the header in eight bytes, the header as JSON, and the data.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
        start, end = entry["data_offsets"]
        file.seek(8 + length + start)
        return np.frombuffer(file.read(end - start), float8_e4m3fn).reshape(entry["shape"])


def is_export(name: str) -> bool:
    """Returns whether a file of this name is part of an export (weights, index or config)."""
    return name == "config.json" or name.endswith((".safetensors", ".safetensors.index.json"))


def write(
    tensors: Iterable[tuple[str, np.ndarray]], directory: Path, shard_bytes: int = 5 * 10**9
) -> None:
    """Writes tensors into safetensors files, holding one file at a time in memory.

    Args:
        tensors: Name and value of each tensor.
        directory: The folder, which exists.
        shard_bytes: Largest size of a file in bytes, unless one tensor is larger.

    Raises:
        OSError: If the disk is full.
    """
    shards: list[tuple[Path, list[str]]] = []
    held: dict[str, np.ndarray] = {}
    total = size = 0

    def flush() -> None:
        path = directory / f"shard-{len(shards)}"
        try:
            save_file(held, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written ({error}): free some space") from error
        shards.append((path, list(held)))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = np.ascontiguousarray(tensor)
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        shards[0][0].rename(directory / _ONE)
        return
    where: dict[str, str] = {}
    for i, (path, names) in enumerate(shards, 1):
        final = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        path.rename(directory / final)
        where |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / _INDEX).write_text(json.dumps(index, indent=2))
