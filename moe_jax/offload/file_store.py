"""Experts in memory-mapped safetensors files, one file per MoE layer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_jax.errors import ConfigError, line_of
from moe_jax.files import check_folder, write_json
from moe_jax.offload.store import ExpertArrays, ExpertId

INDEX = "offload.json"


def write_experts(layers: Iterable[Iterable[ExpertArrays]], folder: Path | str) -> None:
    """Writes experts for a ``FileStore``; one layer at a time is in memory.

    Args:
        layers: The experts of each MoE layer, as from ``arrays_of`` or ``quantised_expert``.
        folder: New folder.

    Raises:
        ConfigError: If the folder cannot be written or already holds experts.
        OSError: If the disk is full.
    """
    folder = Path(folder)
    check_folder(folder, "folder")
    if (folder / INDEX).exists():
        raise ConfigError(f"{folder} already holds experts: use a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [_write_layer(list(own), _file(folder, i)) for i, own in enumerate(layers)]
    # Without its index, a folder holds no experts: an interrupted write is never read.
    write_json(folder / INDEX, {"nbytes": sizes})


class FileStore:
    """Holds experts in files, which are mapped into memory for each read.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from moe_jax.offload import FileStore, write_experts
        >>> expert = {"up": np.ones((4, 2), np.float32)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_experts([[expert, expert]], folder)
        ...     store = FileStore(folder)
        ...     store.experts, store.nbytes((0, 1)), store.read((0, 1))["up"].shape
        ((2,), 32, (4, 2))
    """

    def __init__(self, folder: Path | str):
        """Reads the index of a folder, and the names of the arrays in its files.

        Raises:
            ConfigError: If the folder holds no experts, or a file is missing or damaged.
        """
        self._folder = Path(folder)
        index = self._folder / INDEX
        if not index.exists():
            raise ConfigError(
                f"{self._folder} holds no experts, or not all of them: write them with "
                "moe_jax.offload.write_experts"
            )
        try:
            self._sizes: list[list[int]] = json.loads(index.read_text())["nbytes"]
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise _damaged(index, error) from error
        self._names = [self._names_of(layer) for layer in range(len(self._sizes))]

    @property
    def experts(self) -> tuple[int, ...]:
        """Number of experts of each MoE layer."""
        return tuple(len(sizes) for sizes in self._sizes)

    def nbytes(self, expert: ExpertId) -> int:
        """Returns the number of bytes of the arrays of an expert."""
        layer, index = expert
        return self._sizes[layer][index]

    def read(self, expert: ExpertId) -> ExpertArrays:
        """Returns copies of the arrays of an expert by name.

        Raises:
            ConfigError: If the file is missing or damaged.
        """
        layer, index = expert
        path = _file(self._folder, layer)
        try:
            # The map is closed again: pages that stay mapped count as memory of the process.
            with safe_open(path, "np") as file:
                return {
                    name: file.get_tensor(f"{index}/{name}") for name in self._names[layer][index]
                }
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error

    def _names_of(self, layer: int) -> list[list[str]]:
        """Returns the names of the arrays of each expert of a layer."""
        path = _file(self._folder, layer)
        names: list[list[str]] = [[] for _ in self._sizes[layer]]
        try:
            with safe_open(path, "np") as file:
                for key in file.keys():  # noqa: SIM118, as a file is no mapping
                    index, _, name = key.partition("/")
                    names[int(index)].append(name)
        except (SafetensorError, OSError, ValueError, IndexError) as error:
            raise _damaged(path, error) from error
        return names


def _write_layer(experts: list[ExpertArrays], path: Path) -> list[int]:
    """Writes the file of one layer; returns the number of bytes of each expert."""
    tensors = {
        f"{index}/{name}": np.ascontiguousarray(array)
        for index, own in enumerate(experts)
        for name, array in own.items()
    }
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {line_of(error)}") from error
    return [sum(array.nbytes for array in own.values()) for own in experts]


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer{layer:04d}.safetensors"


def _damaged(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path} is damaged: {line_of(error)}; write the experts again")
