"""The file of quantised weights: codes, of which int4 packs two into a byte, scales and factors.

The file stands beside a checkpoint or a converted model that lacks the arrays of the file, and
readers compute these arrays from it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_jax.errors import ConfigError, line_of
from moe_jax.quantised.codes import Codes, Precision

FILE = "quantised.safetensors"
# Marks a folder whose weights are those of codes, without the codes.
NOTE = "quantised.json"
_LEAVES, _SHAPES = "leaves", "shapes"
_STORED: Mapping[str, Any] = {
    "int8": np.dtype(np.int8),
    "int4": np.dtype(ml_dtypes.int4),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}


@dataclasses.dataclass(frozen=True)
class QuantisedArray:
    """The weights ``(E, I, O)`` of one linear map of the experts of a layer.

    Attributes:
        parts: Indices of experts and their codes, by precision; each expert is in one part.
    """

    parts: Mapping[Precision, tuple[tuple[int, ...], Codes]]

    def weights(self) -> Float[np.ndarray, "E I O"]:
        """Returns the weights ``(E, I, O)`` float32 that the codes stand for."""
        found = [(np.asarray(experts), codes.weights()) for experts, codes in self.parts.values()]
        total = sum(len(experts) for experts, _ in found)
        array = np.zeros((total, *found[0][1].shape[1:]), np.float32)
        for experts, weights in found:
            array[experts] = weights
        return array

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """Returns the tensors that a file holds, by name."""
        tensors = {}
        for precision, (experts, codes) in self.parts.items():
            start = f"{name}|{precision}|"
            tensors[f"{start}codes"] = bytes_of(np.asarray(codes.values), precision)
            tensors[f"{start}scales"] = np.asarray(codes.scales, np.float32)
            tensors[f"{start}experts"] = np.asarray(experts, np.int32)
            if codes.factors is not None:
                tensors[f"{start}factors"] = np.asarray(codes.factors, np.float32)
        return tensors

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers ``(I, O)`` of input and output channels."""
        _, codes = next(iter(self.parts.values()))
        return codes.values.shape[1], codes.values.shape[2]


def note_of(summary: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """Returns the file, by name, that marks a folder whose weights are those of codes.

    Args:
        summary: See ``PackedLeaves.summary``; an empty one gives no file.
    """
    return {NOTE: json.dumps(summary)} if summary else {}


def recorded_note(folder: Path) -> dict[str, str]:
    """Returns the file of ``note_of`` that a folder has, by name, or nothing."""
    path = folder / NOTE
    return {NOTE: path.read_text()} if path.is_file() else {}


@dataclasses.dataclass(frozen=True)
class PackedLeaves:
    """Quantised weights of a model, and the arrays of the model that consist of them.

    Attributes:
        arrays: Quantised weights of each layer by name.
        leaves: Name of an array of the model, and the names of its parts; a stack of layers has a
            list of names, and an array of one layer a name.
    """

    arrays: Mapping[str, QuantisedArray]
    leaves: Mapping[str, str | list[str]]

    @property
    def size(self) -> int:
        """Number of bytes of codes, scales, factors and indices."""
        named = self.arrays.items()
        return sum(t.nbytes for name, array in named for t in array.tensors(name).values())

    def summary(self) -> dict[str, dict[str, int]]:
        """Returns the number of experts of each precision, by the name of the array."""
        return {
            name: {precision: len(experts) for precision, (experts, _) in array.parts.items()}
            for name, array in self.arrays.items()
        }

    def write(self, directory: Path) -> None:
        """Writes the file into a folder.

        Raises:
            OSError: If the disk is full.
        """
        tensors: dict[str, np.ndarray] = {}
        for name, array in self.arrays.items():
            tensors |= array.tensors(name)
        shapes = {name: array.shape for name, array in self.arrays.items()}
        about = {_LEAVES: json.dumps(dict(self.leaves)), _SHAPES: json.dumps(shapes)}
        try:
            save_file(tensors, directory / FILE, metadata=about)
        except SafetensorError as error:
            raise OSError(f"{directory / FILE} cannot be written: {line_of(error)}") from error


class PackedFile:
    """The quantised weights in a folder, each of which is read on request.

    Attributes:
        leaves: Names of the arrays that the file holds.
    """

    def __init__(self, directory: Path | str):
        """Opens the file of a folder; a folder without one holds no arrays.

        Raises:
            ConfigError: If the file is damaged.
        """
        self._path = Path(directory) / FILE
        self._leaves: dict[str, str | list[str]] = {}
        if not self._path.exists():
            return
        try:
            with safe_open(self._path, "np") as file:
                about = file.metadata() or {}
                self._names = set(file.keys())
            self._leaves = json.loads(about[_LEAVES])
            self._shapes = json.loads(about[_SHAPES])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ConfigError(f"{self._path} is damaged: {line_of(error)}") from error

    @property
    def leaves(self) -> frozenset[str]:
        """Names of the arrays that the file holds."""
        return frozenset(self._leaves)

    def fill(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Returns the arrays that the file holds, of the wanted types and shardings.

        Args:
            wanted: Shape, type and sharding of each array of the model; others are left out.

        Raises:
            ConfigError: If an array has another shape, or the file is damaged.
        """
        return {name: self._put(name, wanted[name]) for name in wanted if name in self._leaves}

    def _put(self, name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        array = self._leaf(self._leaves[name])
        if array.shape != tuple(like.shape):
            raise ConfigError(
                f"{self._path} is of another model: {name} is {array.shape} in the file and "
                f"{tuple(like.shape)} in the model"
            )
        return jax.device_put(array.astype(like.dtype), like.sharding)

    def _leaf(self, parts: str | list[str]) -> np.ndarray:
        try:
            if isinstance(parts, str):
                return self.array(parts).weights()
            return np.stack([self.array(part).weights() for part in parts])
        except (SafetensorError, OSError, KeyError, ValueError, IndexError) as error:
            raise ConfigError(f"{self._path} is damaged: {line_of(error)}") from error

    def summary(self) -> dict[str, dict[str, int]]:
        """Returns the number of experts of each precision; see ``PackedLeaves.summary``."""
        if not self._leaves:
            return {}
        arrays = {name: self.array(name) for name in self._shapes}
        return PackedLeaves(arrays, self._leaves).summary()

    def array(self, name: str) -> QuantisedArray:
        """Returns the quantised weights of one layer."""
        inputs, outputs = self._shapes[name]
        parts: dict[Any, tuple[tuple[int, ...], Codes]] = {}
        with safe_open(self._path, "np") as file:
            for precision in _STORED:
                start = f"{name}|{precision}|"
                if f"{start}codes" not in self._names:
                    continue
                experts = file.get_tensor(f"{start}experts")
                shape = len(experts), inputs, outputs
                values = _unpacked(file.get_tensor(f"{start}codes"), precision, shape)
                has_factors = f"{start}factors" in self._names
                factors = file.get_tensor(f"{start}factors") if has_factors else None
                codes = Codes(values, file.get_tensor(f"{start}scales"), factors)
                parts[precision] = tuple(experts.tolist()), codes
        return QuantisedArray(parts)


def is_packed(directory: Path | str) -> bool:
    """Returns whether a folder holds quantised weights."""
    return (Path(directory) / FILE).exists()


def bytes_of(values: Shaped[np.ndarray, "E I O"], precision: Precision) -> UInt8[np.ndarray, " N"]:
    """Returns the bytes of codes; an int4 byte has the earlier code in its lower half.

    Args:
        values: Codes; an odd number of int4 codes ends with a byte whose upper half is 0.
        precision: Precision of the codes.
    """
    if precision != "int4":
        return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    flat = values.astype(np.int8).reshape(-1)
    halves = np.pad(flat, (0, flat.size % 2)).reshape(-1, 2).view(np.uint8)
    return (halves[:, 0] & 15) | (halves[:, 1] << 4)


def _unpacked(
    data: UInt8[np.ndarray, " N"], precision: str, shape: tuple[int, int, int]
) -> Shaped[np.ndarray, "E I O"]:
    if precision != "int4":
        return data.view(_STORED[precision]).reshape(shape)
    signed = data.view(np.int8)
    halves = np.stack([signed << 4 >> 4, signed >> 4], axis=-1).reshape(-1)
    return halves[: np.prod(shape)].reshape(shape).astype(_STORED[precision])
