"""A converted model in a folder of its own: ``model.json`` and an Orbax checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from moe_jax import models
from moe_jax.build import build, describe
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import Imported
from moe_jax.parallel import shardings_of_state
from moe_jax.workdir import write_json

_DESCRIPTION, _PARAMETERS = "model.json", "parameters"
_KINDS = {kind.__name__: kind for kind in (models.DecoderConfig, models.EncoderDecoderConfig)}


def save(imported: Imported, directory: Path | str) -> None:
    """Writes a model into an empty folder.

    Raises:
        ConfigError: if something is there.
    """
    directory = Path(directory)
    require_empty(directory)
    state = nnx.to_pure_dict(nnx.state(imported.model))
    ocp.save_pytree((directory / _PARAMETERS).absolute(), _named(state))
    description = {
        "kind": type(imported.config).__name__,
        "config": describe(imported.config),
        "vocab_size": imported.vocab_size,
        "dtype": str(imported.model.embedding.table[...].dtype),
        "family": imported.family,
        "original": imported.original,
    }
    write_json(directory / _DESCRIPTION, description)


def load(directory: Path | str, mesh: Mesh | None = None) -> Imported:
    """Reads a folder that ``save`` wrote, each array into its place on the mesh.

    Raises:
        ConfigError: if it holds no converted model.
    """
    directory = Path(directory)
    if not (directory / _DESCRIPTION).exists():
        raise ConfigError(f"{directory} holds no converted model ({_DESCRIPTION} is missing)")
    found = json.loads((directory / _DESCRIPTION).read_text())
    config = build(_KINDS[found["kind"]], found["config"], "config")
    key = jax.random.key(0)
    abstract = jax.eval_shape(lambda: models.make(config, found["vocab_size"], key))
    graph, state = nnx.split(abstract)
    pure = nnx.to_pure_dict(state)
    saved = ocp.pytree_metadata((directory / _PARAMETERS).absolute()).metadata
    shardings = _shardings(state, mesh)
    like = jax.tree.map(
        lambda leaf, old, s: jax.ShapeDtypeStruct(leaf.shape, old.dtype, sharding=s),
        _named(pure),
        saved,
        shardings,
    )
    tree = ocp.load_pytree((directory / _PARAMETERS).absolute(), like)
    nnx.replace_by_pure_dict(state, _unnamed(tree))
    model = nnx.merge(graph, state)
    return Imported(model, config, found["vocab_size"], found["family"], found["original"])


def require_empty(directory: Path) -> None:
    """Refuses a folder that holds something.

    Raises:
        ConfigError: if it does.
    """
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{directory} is not empty: give another --output")


def _shardings(state: nnx.State, mesh: Mesh | None) -> dict:
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: one, _named(nnx.to_pure_dict(state)))
    return _named(nnx.to_pure_dict(shardings_of_state(state, mesh)))


def _named(tree: dict) -> dict:
    """Keys as text, which a checkpoint needs."""
    return {str(k): _named(v) if isinstance(v, dict) else v for k, v in tree.items()}


def _unnamed(tree: dict) -> dict:
    return {
        int(k) if k.isdigit() else k: _unnamed(v) if isinstance(v, dict) else v
        for k, v in tree.items()
    }
