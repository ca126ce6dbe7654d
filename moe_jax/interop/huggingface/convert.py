"""Conversion of models from and to folders of ``transformers``, tensor by tensor."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from moe_jax import models
from moe_jax.errors import ConfigError
from moe_jax.interop.companions import copy_companions
from moe_jax.interop.huggingface.description import description
from moe_jax.interop.huggingface.entries import Entry
from moe_jax.interop.huggingface.families import family_of
from moe_jax.interop.huggingface.files import is_export, write
from moe_jax.interop.huggingface.opened import Opened, opened
from moe_jax.interop.staging import replaced, require_room
from moe_jax.parallel.rules import sharding_of
from moe_jax.routing.balance import BATCH_LOAD

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Imported:
    """A loaded model.

    Attributes:
        model: Model with its parameters.
        config: Configuration of the model.
        vocab_size: Size ``V`` of the vocabulary.
        family: Family of the model, the ``model_type`` of an export.
        original: Content of the ``config.json`` from which the model was loaded.
    """

    model: models.Model
    config: models.ModelConfig
    vocab_size: int
    family: str
    original: dict[str, Any]


def load(
    directory: Path | str,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    *,
    progress: bool = False,
    **changes: Any,
) -> Imported:
    """Loads a folder with ``config.json`` and safetensors.

    Each tensor is copied to the devices before the next tensor is read, so the host never holds
    much more than the largest tensor. Weights in float8 (DeepSeek-V3) and MXFP4 (gpt-oss) are
    unpacked.

    Args:
        directory: Folder of the released model.
        dtype: Type of parameters and activations, ``float32`` or ``bfloat16``; routers compute in
            float32 in both cases.
        mesh: Mesh over which parameters are sharded; ``None`` for the default device.
        progress: True shows a progress bar.
        **changes: Changed settings of the configuration, such as ``remat``.

    Raises:
        ConfigError: If the family is unknown, if ``config.json`` has an unsupported setting, or if
            tensors are missing, unknown or of another shape. Names are checked before any array is
            allocated.
    """
    _check_dtype(dtype)
    folder = opened(Path(directory), family_of, compute_dtype=dtype, **changes)
    graph, state = nnx.split(_abstract(folder.config, folder.vocab_size))
    parameters = _Parameters(nnx.merge(graph, state), dtype, mesh)
    for entry in tqdm(folder.entries, desc="tensors", disable=not progress):
        parameters.put(entry, folder.read(entry.theirs))
    model = nnx.merge(graph, parameters.state())
    return Imported(model, folder.config, folder.vocab_size, _export_of(folder), folder.original)


@dataclasses.dataclass(frozen=True)
class Described:
    """A folder of ``transformers`` whose weights have not been read.

    Attributes:
        config: Configuration of the model.
        vocab_size: Size ``V`` of the vocabulary.
        family: Family of the model, the ``model_type`` of an export.
        original: Content of ``config.json``.
    """

    config: models.ModelConfig
    vocab_size: int
    family: str
    original: dict[str, Any]


def describe(directory: Path | str) -> Described:
    """Reads ``config.json`` and the names of the tensors, but no tensor.

    Raises:
        ConfigError: If ``load`` would raise it; shapes of tensors are not checked.
    """
    folder = opened(Path(directory), family_of)
    return Described(folder.config, folder.vocab_size, _export_of(folder), folder.original)


def save(
    model: models.Model,
    directory: Path | str,
    family: str,
    *,
    original: dict[str, Any] | None = None,
    companions: Path | None = None,
    texts: Mapping[str, str] | None = None,
    dtype: str = "float32",
    shard_bytes: int = 5 * 10**9,
    progress: bool = False,
) -> None:
    """Writes a folder that ``transformers`` loads, atomically.

    An older export in ``directory`` is removed with all its shards; other files are kept. Routers'
    state, and the tensors that ``transformers`` computes in float32, are float32 in every export.

    Args:
        model: Model to write.
        directory: Folder to write, created if missing.
        family: Value of ``model_type`` to write, a key of ``FAMILIES``.
        original: Content of the ``config.json`` from which the model was loaded; ``CARRIED`` lists
            the settings that are copied.
        companions: Folder whose tokenizer, chat template, generation settings and licences are
            copied; ``None`` for no copies.
        texts: Further files by name, such as the tokenizer of a run.
        dtype: Type of the written tensors, ``float32`` or ``bfloat16``.
        shard_bytes: Size of a shard in bytes.
        progress: True shows a progress bar.

    Raises:
        ConfigError: If the family is unknown or cannot express the model, or the disk is full.
    """
    directory, kind = Path(directory), family_of(family)
    _check_dtype(dtype)
    config, vocab = model.config, model.embedding.table[...].shape[0]
    described = description(kind, config, vocab, dtype, original)
    parameters, entries = _Parameters(model, None, None), list(kind.entries(config))
    parameters.check_all_in(entries, kind.name)
    require_room(directory, sum(parameters.size(entry) for entry in entries) * _BYTES[dtype])
    pairs = (
        (entry.theirs, parameters.take(entry, dtype, kind.exact))
        for entry in tqdm(entries, desc="tensors", disable=not progress)
    )
    with replaced(directory, is_export) as folder:
        if companions:
            copy_companions(companions, folder)
        for name, text in (texts or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        write(pairs, folder, shard_bytes)
        (folder / "config.json").write_text(json.dumps(described, indent=2))


def _export_of(folder: Opened) -> str:
    """Returns the family that an export of the model has."""
    return folder.family.exported or folder.family.name


def _check_dtype(dtype: str) -> None:
    if dtype not in _BYTES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(_BYTES)}")


def _abstract(config: models.ModelConfig, vocab_size: int) -> models.Model:
    return jax.eval_shape(lambda: models.make(config, vocab_size, jax.random.key(0)))


class _Parameters:
    """The parameters of a model, by names that do not depend on scans over layers."""

    def __init__(self, model: models.Model, dtype: str | None, mesh: Mesh | None):
        self._dtype, self._mesh = dtype, mesh
        self._stored = models.stored(model)
        self._flat = dict(nnx.to_flat_state(nnx.state(model)))

    def get(self, name: str) -> np.ndarray:
        """Returns one parameter of one layer."""
        path, index = self._find(name)
        return np.asarray(self._flat[path].get_value()[index])

    def take(self, entry: Entry, dtype: str, exact: tuple[str, ...]) -> np.ndarray:
        """Returns one tensor of the family; routers' state and names in ``exact`` are float32."""
        learnt = all(isinstance(self._flat[self._find(n)[0]], nnx.Param) for n in entry.ours)
        float32 = not learnt or entry.theirs.endswith(exact)
        tensor = entry.layout.to_theirs([self.get(name) for name in entry.ours])
        return tensor.astype("float32" if float32 else dtype)

    def size(self, entry: Entry) -> int:
        """Returns the number of elements of one tensor."""
        return sum(map(math.prod, self._shapes(entry)))

    def _shapes(self, entry: Entry) -> list[tuple[int, ...]]:
        """Returns the shapes of the parameters that one tensor of the family holds."""
        parts = [self._find(name) for name in entry.ours]
        return [self._flat[path].get_value().shape[len(index) :] for path, index in parts]

    def check_all_in(self, entries: list[Entry], family: str) -> None:
        """Rejects a model with a parameter that no tensor of the family holds.

        Raises:
            ConfigError: If there is such a parameter, which the message names.
        """
        held = {self._find(name)[0] for entry in entries for name in entry.ours}
        ours = {path for path in self._flat if not _of_one_step(path)}
        for path in [*ours - held, *held - ours]:
            name = ".".join(map(str, path))
            raise ConfigError(f"{family} cannot express {name}: its tensors and the model's differ")

    def put(self, entry: Entry, tensor: np.ndarray) -> None:
        """Copies one tensor of the family into its parameters.

        Raises:
            ConfigError: If the tensor has another shape than ``config.json`` describes.
        """
        shapes = self._shapes(entry)
        try:
            arrays = entry.layout.to_ours(tensor, shapes)
            fits = [array.shape for array in arrays] == [tuple(shape) for shape in shapes]
        except (ValueError, IndexError):
            fits = False
        if not fits:
            raise ConfigError(
                f"{entry.theirs} has shape {tensor.shape}, but config.json describes "
                f"{', '.join(map(str, shapes))}"
            )
        for name, array in zip(entry.ours, arrays, strict=True):
            self._put(*self._find(name), array)

    def state(self) -> nnx.State:
        """Returns all parameters.

        Raises:
            ConfigError: If no tensor of the family holds a parameter.
        """
        unread = {
            path: variable
            for path, variable in self._flat.items()
            if isinstance(variable.get_value(), jax.ShapeDtypeStruct)
        }
        for path in filter(_of_one_step, unread):
            variable = unread[path]
            self._flat[path] = variable.replace(self._empty(variable, variable.get_value()))
        empty = [".".join(map(str, path)) for path in unread if not _of_one_step(path)]
        if empty:
            raise ConfigError(f"no tensor holds {', '.join(empty)}")
        return nnx.from_flat_state(self._flat)

    def _put(self, path: tuple, index: tuple[int, ...], array: np.ndarray) -> None:
        variable = self._flat[path]
        value = variable.get_value()
        if isinstance(value, jax.ShapeDtypeStruct):
            value = self._empty(variable, value)
        rows = tuple(jnp.int32(i) for i in index)
        variable = variable.replace(_assigned(value, rows, array))
        self._flat[path] = variable

    def _empty(self, variable: nnx.Variable, shape: jax.ShapeDtypeStruct) -> jax.Array:
        dtype = self._dtype if isinstance(variable, nnx.Param) else shape.dtype
        sharding = sharding_of(variable, shape.shape, self._mesh) if self._mesh else None
        return jnp.zeros(shape.shape, dtype, device=sharding)

    def _find(self, name: str) -> tuple[tuple, tuple[int, ...]]:
        """Returns the path of a parameter and the index of the layer's part in its array."""
        name, _, part = name.partition("|")
        keys = tuple(int(key) if key.isdigit() else key for key in name.split("."))
        stored = self._stored.get(keys, models.Stored(keys))
        index = () if stored.entry is None else (stored.entry,)
        return stored.path, (*index, int(part)) if part else index


def _of_one_step(path: tuple) -> bool:
    """Returns whether a state is zero between training steps, so that no folder holds it."""
    return path[-1] == BATCH_LOAD


@functools.partial(jax.jit, donate_argnums=0)
def _assigned(value: jax.Array, index: tuple[jax.Array, ...], part: jax.Array) -> jax.Array:
    return value.at[index].set(part.astype(value.dtype))
