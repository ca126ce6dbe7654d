"""Opens a folder of ``transformers``: checks the names of its tensors before reading any."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface.entries import Entry
from moe_jax.interop.huggingface.family import Family
from moe_jax.interop.huggingface.files import TensorFiles, read_json
from moe_jax.interop.huggingface.keys import Json, require
from moe_jax.interop.huggingface.layouts import as_stored, names_of, without_copies
from moe_jax.models import ModelConfig

_PACKED = ("fp8", "mxfp4")


@dataclasses.dataclass(frozen=True)
class Opened:
    """A folder that holds exactly the tensors of its model.

    Attributes:
        family: Family of the model.
        config: Configuration of the model.
        vocab_size: Size ``V`` of the vocabulary.
        original: Content of ``config.json``.
        entries: Tensors of the model as the files store them.
        read: Function that reads a tensor by its name in the family.
    """

    family: Family[Any]
    config: ModelConfig
    vocab_size: int
    original: Json
    entries: tuple[Entry, ...]
    read: Callable[[str], np.ndarray]


def opened(directory: Path, family_of: Callable[[Any], Family[Any]], **changes: Any) -> Opened:
    """Opens a folder and checks its configuration and the names of its tensors.

    Args:
        directory: The folder.
        family_of: Function that returns the family of a ``model_type``.
        **changes: Fields of the model's configuration to replace.

    Raises:
        ConfigError: If ``config.json`` has an unsupported setting, or tensors are missing or
            unknown.
    """
    path = directory / "config.json"
    given = require(read_json(path), dict, str(path))
    family = family_of(given.get("model_type", ""))
    settings = family.settings(given)
    files = TensorFiles(directory, _tile(given))
    names = names_of(family, given, files.names)
    settings = family.without(settings, names)
    config = dataclasses.replace(family.build(settings), **changes)
    names = without_copies(family, names, config.tie_embeddings, files.read)
    entries = tuple(as_stored(family.entries(config), names))
    _check_names(names.keys(), entries, directory)
    return Opened(
        family,
        config,
        settings[family.vocab],
        given,
        entries,
        lambda name: files.read(names[name]),
    )


def _tile(config: dict[str, Any]) -> tuple[int, int]:
    """Returns the rows and columns of an eight-bit weight that share a scale."""
    given = config.get("quantization_config") or {}
    require(given, dict, "quantization_config in config.json")
    method = given.get("quant_method", "fp8")
    if method not in _PACKED:
        raise ConfigError(
            f"config.json says quant_method={method!r}, but only "
            f"{' or '.join(map(repr, _PACKED))} is supported: store the weights unpacked"
        )
    tile = given.get("weight_block_size") or (128, 128)
    if not isinstance(tile, (list, tuple)) or len(tile) != 2:
        raise ConfigError(
            f"config.json says weight_block_size={tile!r}, but it must be two numbers"
        )
    for side in tile:
        if require(side, int, "a side of weight_block_size in config.json") < 1:
            raise ConfigError(f"config.json says weight_block_size={tile!r}: a side is at least 1")
    rows, columns = tile
    return rows, columns


def _check_names(names: Set[str], entries: tuple[Entry, ...], directory: Path) -> None:
    wanted = {entry.theirs for entry in entries}
    for kind, found in (("lacks", wanted - names), ("has unknown", names - wanted)):
        if found:
            shown = ", ".join(sorted(found)[:8]) + (" ..." if len(found) > 8 else "")
            raise ConfigError(f"{directory} {kind} {len(found)} tensor(s): {shown}")
