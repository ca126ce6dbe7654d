"""Reads the tables of experts by token id from a released model (DeepSeek-V4's ``tid2eid``)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface.files import TensorFiles

_TABLE = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:\w+\.)*tid2eid$")


def token_tables(folder: Path) -> dict[int, Int32[np.ndarray, "V K"]]:
    """Returns the experts ``(V, K)`` of each token id, by the index of the layer.

    Args:
        folder: Folder of a model with safetensors files, of which the tables alone are read.

    Raises:
        ConfigError: If the folder has no weights or no table, or if a table is no list of different
            experts per token id.
    """
    files = TensorFiles(folder)
    names = {int(found[1]): name for name in files.names if (found := _TABLE.search(name))}
    if not names:
        raise ConfigError(
            f"{folder} has no tensor layers.*.tid2eid: only the hash layers of DeepSeek-V4 have "
            "tables of token ids"
        )
    return {layer: _checked(files.integers(name), name) for layer, name in sorted(names.items())}


def save_token_tables(folder: Path, output: Path) -> dict[int, Path]:
    """Writes each table of a released model as a NumPy file that the router ``ByToken`` reads.

    Args:
        folder: Folder of the model; see ``token_tables``.
        output: Folder for the files ``layer_0.npy``, ...; it is created if necessary.

    Returns:
        The files by the index of the layer.

    Raises:
        ConfigError: See ``token_tables``.
    """
    tables = token_tables(folder)
    output.mkdir(parents=True, exist_ok=True)
    paths = {layer: output / f"layer_{layer}.npy" for layer in tables}
    for layer, path in paths.items():
        np.save(path, tables[layer])
    return paths


def _checked(table: np.ndarray, name: str) -> Int32[np.ndarray, "V K"]:
    if table.ndim != 2 or table.size == 0 or table.min() < 0:
        raise ConfigError(f"{name} has shape {table.shape}, but a table has (V, K) experts from 0")
    ordered = np.sort(table, axis=1)
    twice = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(1))
    if len(twice):
        raise ConfigError(
            f"{name} lists an expert twice for token id {twice[0]}, as an untrained table of zeros "
            "does: use the table of a released model"
        )
    return table.astype(np.int32)
