"""Where a model stores the arrays of each layer, however its layers are stacked for scans."""

from __future__ import annotations

import dataclasses

from flax import nnx

from moe_jax.models.stack import Stack

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a model stores one array of one layer.

    Attributes:
        path: the path of the variable in the model's state.
        entry: the layer's index on the variable's leading axis; ``None`` if the variable is of
            this layer alone, or of no layer.
    """

    path: Path
    entry: int | None = None


def stored(model: nnx.Module) -> dict[Path, Stored]:
    """Returns where each array is, by a path that does not depend on which layers are scanned.

    A stack ``layers`` that scans two blocks stores its layers 1 and 3 in one variable:
    ``layers, parts, 0, 1, attention, query`` holds both ``layers, 1, attention, query`` and
    ``layers, 3, attention, query``.

    Args:
        model: with arrays or shapes.
    """
    layers: dict[Path, list[tuple[Path, int | None]]] = {}
    for path, module in nnx.iter_modules(model):
        for layer in module.layers() if isinstance(module, Stack) else ():
            own = (*path, layer.index), layer.entry
            layers.setdefault((*path, *layer.path), []).append(own)
    found = {}
    for path, _ in nnx.to_flat_state(nnx.state(model)):
        block = next((path[:i] for i in range(len(path)) if path[:i] in layers), ())
        for prefix, entry in layers.get(block, [((), None)]):
            found[*prefix, *path[len(block) :]] = Stored(path, entry)
    return found
