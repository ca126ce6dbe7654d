"""The folder of a converted model: ``model.json`` and an Orbax checkpoint."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from moe_jax import models
from moe_jax.config.schema import build, describe
from moe_jax.errors import ConfigError, line_of
from moe_jax.files import write_json
from moe_jax.interop.companions import copy_companions
from moe_jax.interop.huggingface import Imported
from moe_jax.interop.staging import replaced, require_room
from moe_jax.models.leading_axis import as_saved, as_wanted
from moe_jax.parallel import shardings_of_state
from moe_jax.quantised.packed import PackedFile, PackedLeaves

DESCRIPTION, PARAMETERS, BESIDE = "model.json", "parameters", "released"
_KINDS = {kind.__name__: kind for kind in (models.DecoderConfig, models.EncoderDecoderConfig)}
_KEYS = ("kind", "config", "vocab_size", "family", "original")


def save(
    imported: Imported,
    directory: Path | str,
    companions: Path | None = None,
    packed: PackedLeaves | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes a model into an empty folder, atomically.

    Args:
        imported: Model with its configuration.
        directory: Folder to write, empty or missing.
        companions: Folder whose tokenizer, chat template, generation settings and licences are
            copied to ``released/``; ``None`` for no copies.
        packed: Quantised weights, which the folder holds as codes; ``None`` for none.
        texts: Further files by name.

    Raises:
        ConfigError: If the folder is not empty, or the disk is full.
    """
    directory = Path(directory)
    require_empty(directory)
    state = _named(nnx.to_pure_dict(nnx.state(imported.model)))
    state, _ = _parted(state, packed.leaves if packed else ())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    require_room(directory, size + (packed.size if packed else 0))
    description = {
        "kind": type(imported.config).__name__,
        "config": describe(imported.config),
        "vocab_size": imported.vocab_size,
        "dtype": str(imported.model.embedding.table[...].dtype),
        "family": imported.family,
        "original": imported.original,
    }
    with replaced(directory) as folder:
        if companions is not None:
            copy_companions(companions, folder / BESIDE)
        try:
            ocp.save_pytree((folder / PARAMETERS).absolute(), state)
        except Exception as error:
            raise OSError(f"{directory} cannot be written: {line_of(error)}") from error
        if packed is not None:
            packed.write(folder)
        for name, text in (texts or {}).items():
            (folder / name).write_text(text)
        write_json(folder / DESCRIPTION, description)


def describes(directory: Path | str) -> dict[str, Any]:
    """Returns the content of ``model.json``.

    Raises:
        ConfigError: If the folder holds no converted model, or an incomplete one.
    """
    path = Path(directory) / DESCRIPTION
    if not path.exists():
        raise ConfigError(f"{directory} holds no converted model ({DESCRIPTION} is missing)")
    again = "convert it again"
    try:
        described = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): {again}") from error
    missing = [key for key in _KEYS if not isinstance(described, dict) or key not in described]
    if missing or described["kind"] not in _KINDS:
        lost = f"lacks {', '.join(missing)}" if missing else f"has kind={described['kind']!r}"
        raise ConfigError(f"{path} {lost}: {again}")
    if not (path.parent / PARAMETERS).is_dir():
        raise ConfigError(f"{directory} is half converted ({PARAMETERS}/ is missing): {again}")
    return described


def config_of(described: dict[str, Any]) -> models.ModelConfig:
    """Returns the configuration of the model that ``model.json`` describes."""
    return build(_KINDS[described["kind"]], described["config"], "config")


def load(directory: Path | str, mesh: Mesh | None = None) -> Imported:
    """Returns the model in a folder that ``save`` wrote, with its arrays sharded over the mesh.

    Raises:
        ConfigError: If the folder holds no converted model, or an incomplete one.
    """
    directory = Path(directory)
    described = describes(directory)
    config = config_of(described)
    key = jax.random.key(0)
    abstract = jax.eval_shape(lambda: models.make(config, described["vocab_size"], key))
    graph, state = nnx.split(abstract)
    try:
        tree = _restored(directory / PARAMETERS, state, mesh)
    except Exception as error:
        raise ConfigError(
            f"{directory / PARAMETERS} does not hold the parameters that {DESCRIPTION} describes "
            f"({line_of(error)}): convert it again"
        ) from error
    nnx.replace_by_pure_dict(state, _unnamed(tree))
    model = nnx.merge(graph, state)
    return Imported(
        model, config, described["vocab_size"], described["family"], described["original"]
    )


def _restored(path: Path, state: nnx.State, mesh: Mesh | None) -> dict:
    saved = ocp.pytree_metadata(path.absolute()).metadata
    packed = PackedFile(path.parent)

    def wanted(leaf: jax.Array, old: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, old.dtype, sharding=sharding)

    def target(path: tuple, leaf: jax.ShapeDtypeStruct, old: Any) -> jax.ShapeDtypeStruct:
        leaf = as_saved(leaf, old.shape)
        if tuple(old.shape) != leaf.shape:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(f"{name} has shape {tuple(old.shape)}, not {leaf.shape}")
        return leaf

    named, shardings = _named(nnx.to_pure_dict(state)), _shardings(state, mesh)
    named, quantised = _parted(named, packed.leaves)
    shardings, places = _parted(shardings, packed.leaves)
    like = jax.tree.map(wanted, named, saved, shardings)
    targets = jax.tree_util.tree_map_with_path(target, like, saved)
    found = jax.tree.map(as_wanted, ocp.load_pytree(path.absolute(), targets), like)
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name])
        for name, leaf in quantised.items()
    }
    filled = {_key(name): array for name, array in packed.fill(shapes).items()}
    return unflatten_dict(flatten_dict(found, keep_empty_nodes=True) | filled)


def _parted(tree: dict, packed: Collection[str]) -> tuple[dict, dict[str, Any]]:
    """Returns the tree without the arrays of a file of quantised weights, and these by name."""
    flat = flatten_dict(tree, keep_empty_nodes=True)
    parted = {name: flat.pop(_key(name)) for name in packed}
    return unflatten_dict(flat), parted


def _key(name: str) -> tuple[str, ...]:
    """Returns the path of a parameter in the tree by its name, as ``params/embedding/table``."""
    return tuple(name.split("/")[1:])


def require_empty(directory: Path) -> None:
    """Rejects an output that is a file or a folder with files.

    Raises:
        ConfigError: If the output is a file, or the folder is not empty.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file, not a folder: give another --output")
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{directory} is not empty: give another --output")


def _shardings(state: nnx.State, mesh: Mesh | None) -> dict:
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: one, _named(nnx.to_pure_dict(state)))
    return _named(nnx.to_pure_dict(shardings_of_state(state, mesh)))


def _named(tree: dict) -> dict:
    """Returns the tree with keys as text, as a checkpoint requires."""
    return {str(k): _named(v) if isinstance(v, dict) else v for k, v in tree.items()}


def _unnamed(tree: dict) -> dict:
    """Returns the tree with integer keys, the inverse of ``_named``."""
    return {
        int(k) if k.isdigit() else k: _unnamed(v) if isinstance(v, dict) else v
        for k, v in tree.items()
    }
