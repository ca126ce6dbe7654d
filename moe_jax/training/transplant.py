"""Weights of one model in the place of another's, layer by layer, however either is scanned."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import models
from moe_jax.errors import ConfigError
from moe_jax.training.state import TrainState, from_named_leaves, named_leaves

Array = jax.Array
_PARAMS, WEIGHTS = "params/", ("params/", "router_state/")
# ``parts/P/B`` of a stack is block B of its P-th part, whose leaves hold one entry per repeat.
_STACKED = re.compile(
    r"^(?P<tree>\w+)/(?P<stack>.*?)/parts/(?P<part>\d+)/(?P<block>\d+)/(?P<rest>.*)$"
)
_SPARSE = re.compile(r"/feed_forward/(experts|router)/")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an array of one layer is: in a leaf, and of a stacked one at which entry."""

    leaf: str
    entry: int | None = None


def layers_apart(leaves: Mapping[str, Any]) -> dict[str, Place]:
    """Returns where each layer's arrays are, under names that do not depend on scanning.

    ``params/layers/parts/0/1/attention/query``, stacked twice in a part of two blocks, holds
    ``params/layers/1/attention/query`` and ``params/layers/3/attention/query``.

    Args:
        leaves: arrays or shapes by name, as from ``named_leaves``: all parameters, and whatever
            else has their layers.
    """
    stacked = {name: match for name in leaves if (match := _STACKED.match(name))}
    sizes: dict[tuple[str, int], tuple[int, int]] = {}
    for name, match in stacked.items():
        part = match["stack"], int(match["part"])
        blocks, _ = sizes.get(part, (0, 0))
        sizes[part] = max(blocks, int(match["block"]) + 1), leaves[name].shape[0]
    found = {}
    for name in leaves:
        match = stacked.get(name)
        if match is None:
            found[name] = Place(name)
            continue
        stack, part = match["stack"], int(match["part"])
        first = sum(b * n for (s, p), (b, n) in sizes.items() if s == stack and p < part)
        blocks, repeats = sizes[stack, part]
        for entry in range(repeats):
            layer = first + entry * blocks + int(match["block"])
            found[f"{match['tree']}/{stack}/{layer}/{match['rest']}"] = Place(name, entry)
    return found


def weight_shapes(model: models.ModelConfig, vocab_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes of parameters and routers' state, by the names of ``named_leaves``."""
    made = jax.eval_shape(lambda: models.make(model, vocab_size, jax.random.key(0)))
    _, params, rest = nnx.split(made, nnx.Param, ...)
    return named_leaves({"params": params, "router_state": rest})


def types_apart(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Returns the type of every layer's arrays, such as ``float32[16,64]``."""
    return {name: _type(leaves[p.leaf], p.entry) for name, p in layers_apart(leaves).items()}


def _type(leaf: Any, entry: int | None) -> str:
    shape = leaf.shape if entry is None else leaf.shape[1:]
    return f"{leaf.dtype}[{','.join(map(str, shape))}]"


def check_all(new: Mapping[str, Any], old: Mapping[str, Any], source: str) -> None:
    """Refuses two models that differ in an array.

    Args:
        new: weights of the new run, arrays or shapes by name.
        old: those of the run it starts from.
        source: names that run, for the message.

    Raises:
        ConfigError: naming the first array that differs.
    """
    here, there = types_apart(new), types_apart(old)
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if names:
        name = names[0]
        raise ConfigError(
            f"{source} is of another model: {name} is {there.get(name, 'absent')} there and "
            f"{here.get(name, 'absent')} here ({len(names)} differ); use its model settings, or "
            "training.start_with=shared"
        )


def shared(new: Mapping[str, Any], old: Mapping[str, Any]) -> set[str]:
    """Returns the parameters of equal name and shape that are no experts' and no routers'."""
    here, there = types_apart(new), types_apart(old)
    return {
        name
        for name, kind in here.items()
        if there.get(name) == kind and name.startswith(_PARAMS) and not _SPARSE.search(name)
    }


@dataclasses.dataclass(frozen=True)
class Transplant:
    """Puts weights of another model in the place of those that were drawn.

    Attributes:
        only_shared: those of ``shared`` alone; otherwise all parameters and routers' state.
    """

    only_shared: bool

    def __call__(self, state: TrainState, source: Mapping[str, Array]) -> TrainState:
        """Returns ``state`` with the weights of ``source``, by the names of ``named_leaves``."""
        leaves = named_leaves(state)
        drawn = {name: leaf for name, leaf in leaves.items() if name.startswith(WEIGHTS)}
        chosen = shared(drawn, source) if self.only_shared else set(types_apart(drawn))
        return from_named_leaves(state, leaves | _moved(drawn, source, chosen))


def _moved(
    drawn: Mapping[str, Array], source: Mapping[str, Array], chosen: Collection[str]
) -> dict[str, Array]:
    """Returns ``drawn`` with what is ``chosen`` taken from ``source``.

    Args:
        drawn: the new model's.
        source: the other model's.
        chosen: by the names of ``layers_apart``.
    """
    here, there = layers_apart(drawn), layers_apart(source)
    moved: dict[str, Any] = {}
    for name, place in here.items():
        value = _taken(drawn, place)
        if name in chosen:
            value = _over(value, _taken(source, there[name]))
        if place.entry is None:
            moved[place.leaf] = value
        else:
            moved.setdefault(place.leaf, []).append((place.entry, value))
    return {
        leaf: jnp.stack([value for _, value in sorted(found, key=lambda item: item[0])])
        if isinstance(found, list)
        else found
        for leaf, found in moved.items()
    }


def _over(drawn: Array, source: Array) -> Array:
    """Returns ``source`` in the type of ``drawn``; rows that ``source`` lacks stay as drawn."""
    source = source.astype(drawn.dtype)
    if source.shape == drawn.shape:
        return source
    return jax.lax.dynamic_update_slice(drawn, source, (0,) * drawn.ndim)


def _taken(leaves: Mapping[str, Array], place: Place) -> Array:
    leaf = leaves[place.leaf]
    return leaf if place.entry is None else leaf[place.entry]
