"""Loading and saving, tensor by tensor."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from moe_jax import models
from moe_jax.errors import ConfigError, nearest
from moe_jax.interop.huggingface.dbrx import DBRX
from moe_jax.interop.huggingface.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from moe_jax.interop.huggingface.encoder_decoders import NLLB_MOE, SWITCH
from moe_jax.interop.huggingface.entries import Entry
from moe_jax.interop.huggingface.family import OUTER, Family
from moe_jax.interop.huggingface.files import write
from moe_jax.interop.huggingface.function import function_of
from moe_jax.interop.huggingface.fused import GPT_OSS, LLAMA4
from moe_jax.interop.huggingface.keys import require
from moe_jax.interop.huggingface.llama_like import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from moe_jax.interop.huggingface.opened import opened
from moe_jax.models.stack import Stack
from moe_jax.parallel.rules import sharding_of

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        MIXTRAL,
        QWEN2_MOE,
        QWEN3_MOE,
        OLMOE,
        DBRX,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        LLAMA4,
        GPT_OSS,
        SWITCH,
        NLLB_MOE,
    )
}
_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Imported:
    """A loaded model.

    Attributes:
        model: with its parameters.
        config: its configuration.
        vocab_size: ``V``.
        family: the ``model_type``.
        original: the ``config.json`` that it came with.
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

    Each tensor goes to its place on the devices before the next is read, so that the host never
    holds much more than the largest one. Weights in float8 (DeepSeek-V3) and MXFP4 (gpt-oss) are
    unpacked.

    Args:
        directory: the folder.
        dtype: of parameters and activations, ``float32`` or ``bfloat16``; routers compute in
            float32 either way.
        mesh: the devices; ``None`` for the default one.
        progress: show a progress bar.
        **changes: of the configuration, such as ``remat``.

    Raises:
        ConfigError: if the family is unknown, says something that is not supported, or tensors are
            missing, unknown or of another shape. Nothing is allocated before names are checked.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(_DTYPES)}")
    found = opened(Path(directory), _family, compute_dtype=dtype, **changes)
    graph, state = nnx.split(_abstract(found.config, found.vocab_size))
    places = _Places(nnx.merge(graph, state), dtype, mesh)
    for entry in tqdm(found.entries, desc="tensors", disable=not progress):
        places.put(entry, found.read(entry.theirs))
    model = nnx.merge(graph, places.state())
    return Imported(model, found.config, found.vocab_size, found.family.name, found.original)


def save(
    model: models.Model,
    directory: Path | str,
    family: str,
    *,
    original: dict[str, Any] | None = None,
    dtype: str = "float32",
    shard_bytes: int = 5 * 10**9,
    progress: bool = False,
) -> None:
    """Writes a folder that ``transformers`` loads.

    Args:
        model: the model.
        directory: the folder, made if it is not there.
        family: the ``model_type`` to write, a key of ``FAMILIES``.
        original: a ``config.json`` whose other settings are kept.
        dtype: of the tensors written.
        shard_bytes: the size of a file.
        progress: show a progress bar.

    Raises:
        ConfigError: if the family is unknown or cannot say what the model is.
    """
    directory, kind = Path(directory), _family(family)
    config, vocab = model.config, model.embedding.table[...].shape[0]
    kept = {key: value for key, value in (original or {}).items() if key != "quantization_config"}
    written = kept | kind.write(config) | {kind.vocab: vocab}
    written |= {"model_type": kind.name, "architectures": [kind.architecture], "dtype": dtype}
    _check_same_model(kind, written, config)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(written, indent=2))
    places = _Places(model, None, None)
    entries = tqdm(list(kind.entries(config)), desc="tensors", disable=not progress)
    pairs = (
        (e.theirs, e.layout.to_theirs([places.get(name) for name in e.ours]).astype(dtype))
        for e in entries
    )
    write(pairs, directory, shard_bytes)


def _family(name: Any) -> Family:
    require(name, str, "model_type in config.json")
    name = {OUTER: "llama4_text"}.get(name, name)
    if name not in FAMILIES:
        raise ConfigError(f"model_type={name!r} is unknown{nearest(name, FAMILIES)}")
    return FAMILIES[name]


def _check_same_model(family: Family, written: dict[str, Any], config: models.ModelConfig) -> None:
    """Refuses a model that ``config.json`` cannot describe: what is read back must compute it."""
    wanted, back = function_of(config), function_of(family.read(written))
    different = [name for name in wanted if wanted[name] != back.get(name)]
    if different:
        name = different[0]
        raise ConfigError(
            f"{family.name} cannot say {name}={wanted[name]!r}, it would be {back.get(name)!r}"
        )


def _abstract(config: models.ModelConfig, vocab_size: int) -> models.Model:
    return jax.eval_shape(lambda: models.make(config, vocab_size, jax.random.key(0)))


class _Places:
    """The parameters of a model by name, as if no layer were scanned."""

    def __init__(self, model: models.Model, dtype: str | None, mesh: Mesh | None):
        self._model, self._dtype, self._mesh = model, dtype, mesh
        self._state = nnx.state(model)
        self._flat = dict(nnx.to_flat_state(self._state))

    def get(self, name: str) -> np.ndarray:
        """Returns one parameter of one layer."""
        path, index = self._find(name)
        return np.asarray(self._flat[path].get_value()[index])

    def put(self, entry: Entry, tensor: np.ndarray) -> None:
        """Puts one tensor of theirs where it belongs."""
        found = [self._find(name) for name in entry.ours]
        shapes = [self._flat[path].get_value().shape[len(index) :] for path, index in found]
        try:
            arrays = entry.layout.to_ours(tensor, shapes)
            fits = [array.shape for array in arrays] == [tuple(shape) for shape in shapes]
        except (ValueError, IndexError):
            fits = False
        if not fits:
            raise ConfigError(
                f"{entry.theirs} has shape {tensor.shape}, which is not what config.json says: "
                f"{', '.join(map(str, shapes))}"
            )
        for (path, index), array in zip(found, arrays, strict=True):
            self._put(path, index, array)

    def state(self) -> nnx.State:
        """Returns all parameters.

        Raises:
            ConfigError: if a parameter is in no tensor of the family.
        """
        empty = [
            ".".join(map(str, path))
            for path, variable in self._flat.items()
            if isinstance(variable.get_value(), jax.ShapeDtypeStruct)
        ]
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
        """Returns the path of a parameter and where in its array the layer's part is."""
        name, _, part = name.partition("|")
        keys = [int(key) if key.isdigit() else key for key in name.split(".")]
        index: tuple[int, ...] = ()
        module: Any = self._model
        for at, key in enumerate(keys):
            if isinstance(module, Stack):
                place, block, step = module.place(key)
                keys[at : at + 1] = ["parts", place, block]
                index = (step,)
                break
            module = module[key] if isinstance(key, int) else getattr(module, key, None)
        return tuple(keys), (*index, int(part)) if part else index


@functools.partial(jax.jit, donate_argnums=0)
def _assigned(value: jax.Array, index: tuple[jax.Array, ...], part: jax.Array) -> jax.Array:
    return value.at[index].set(part.astype(value.dtype))
