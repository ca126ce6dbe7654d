"""The path of each layer's arrays in a model's state, with and without scans over layers."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from moe_jax.models.stack import Stack

Path = tuple[Any, ...]  # of texts and integers


@dataclasses.dataclass(frozen=True)
class Stored:
    """The location of one array of one layer in a model's state.

    Attributes:
        path: Path of the variable in the model's state.
        entry: Index of the layer on the variable's leading axis; ``None`` if the variable belongs
            to this layer alone, or to no layer.
    """

    path: Path
    entry: int | None = None


def stored(model: nnx.Module) -> dict[Path, Stored]:
    """Returns the location of each array, by a path that is the same with and without scans.

    A stack ``layers`` that scans two blocks stores its layers 1 and 3 in one variable:
    ``layers, parts, 0, 1, attention, query`` holds both ``layers, 1, attention, query`` and
    ``layers, 3, attention, query``.

    Args:
        model: Model of arrays or shapes.
    """
    layers: dict[Path, list[tuple[Path, int | None]]] = {}
    for path, module in nnx.iter_modules(model):
        for layer in module.layers() if isinstance(module, Stack) else ():
            prefix = (*path, layer.index)
            layers.setdefault((*path, *layer.path), []).append((prefix, layer.entry))
    locations: dict[Path, Stored] = {}
    for path, _ in nnx.to_flat_state(nnx.state(model)):
        block = next((path[:i] for i in range(len(path)) if path[:i] in layers), ())
        for prefix, entry in layers.get(block, [((), None)]):
            locations[*prefix, *path[len(block) :]] = Stored(path, entry)
    return locations
