"""Tensors in safetensors files, one at a time; no pickle."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_jax.errors import ConfigError

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class TensorFiles:
    """The tensors of a folder by name, each read when asked for."""

    def __init__(self, directory: Path, prefix: str = ""):
        """Opens the folder; a ``prefix`` of its names is left out.

        Raises:
            ConfigError: if it holds no weights, or an index names files that are not there.
        """
        index = directory / _INDEX
        if index.exists():
            files = json.loads(index.read_text())["weight_map"]
        elif (directory / _ONE).exists():
            with self._open(directory / _ONE) as file:
                files = dict.fromkeys(file.keys(), _ONE)
        else:
            raise ConfigError(f"{directory} has neither {_ONE} nor {_INDEX}")
        lost = sorted(name for name in set(files.values()) if not (directory / name).exists())
        if lost:
            raise ConfigError(f"{directory} lacks {', '.join(lost)}, which its index names")
        self._files = {
            name.removeprefix(prefix): (directory / file, name) for name, file in files.items()
        }
        self.names = frozenset(self._files)

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor."""
        path, stored = self._files[name]
        with self._open(path) as file:
            return file.get_tensor(stored)

    @staticmethod
    def _open(path: Path) -> safe_open:
        try:
            return safe_open(path, "np")
        except SafetensorError as error:
            raise ConfigError(f"{path} is not a safetensors file: {error}") from error


def write(
    tensors: Iterable[tuple[str, np.ndarray]], directory: Path, shard_bytes: int = 5 * 10**9
) -> None:
    """Writes tensors in files of about ``shard_bytes``, holding one file in memory at a time."""
    shards: list[tuple[Path, list[str]]] = []
    held: dict[str, np.ndarray] = {}
    total = size = 0

    def flush() -> None:
        path = directory / f"shard-{len(shards)}"
        save_file(held, path, metadata={"format": "pt"})
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
    where = {}
    for i, (path, names) in enumerate(shards, 1):
        final = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        path.rename(directory / final)
        where |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / _INDEX).write_text(json.dumps(index, indent=2))
