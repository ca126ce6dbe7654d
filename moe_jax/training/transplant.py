"""Transplant of weights between models, layer by layer; each model may scan its layers or not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import models
from moe_jax.errors import ConfigError
from moe_jax.models.adapters import is_adapter, name_without_adapter
from moe_jax.models.places import WeightPath, places
from moe_jax.training.state import TrainState, from_named_leaves, named_leaves, split_model

Array = jax.Array
_PARAMS, WEIGHTS = "params/", ("params/", "router_state/")
_SPARSE = re.compile(r"/feed_forward/(experts|router)/")


@dataclasses.dataclass(frozen=True)
class Weights:
    """The parameters and the routers' state of a model.

    Attributes:
        leaves: Arrays or shapes, by the names of ``named_leaves``.
        places: Location of each layer's arrays, as from ``places``.
    """

    leaves: Mapping[str, Any]
    places: Mapping[str, WeightPath]

    @property
    def types(self) -> dict[str, str]:
        """Type of every layer's arrays, such as ``float32[16,64]``."""
        return {name: _type(self.leaves[p.leaf], p.entry) for name, p in self.places.items()}

    def take(self, name: str) -> Array:
        """Returns one array of one layer."""
        place = self.places[name]
        leaf = self.leaves[place.leaf]
        return leaf if place.entry is None else leaf[place.entry]


def weight_shapes(model: models.ModelConfig, vocab_size: int) -> Weights:
    """Returns the shapes of a model's weights."""
    abstract = jax.eval_shape(lambda: models.make(model, vocab_size, jax.random.key(0)))
    _, params, routers = split_model(abstract)
    return Weights(named_leaves({"params": params, "router_state": routers}), places(model))


def _type(leaf: Any, entry: int | None) -> str:
    shape = leaf.shape if entry is None else leaf.shape[1:]
    return f"{leaf.dtype}[{','.join(map(str, shape))}]"


def check_all(new: Weights, old: Weights, source: str) -> None:
    """Rejects two models that differ in an array.

    Args:
        new: Weights of the new run.
        old: Weights of the run from which the new run starts.
        source: Name of the old run, for the message.

    Raises:
        ConfigError: If an array differs; the message names the first one.
    """
    here, there = new.types, old.types
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if names:
        name = names[0]
        raise ConfigError(
            f"{source} is of another model: {name} is {there.get(name, 'absent')} there and "
            f"{here.get(name, 'absent')} here ({len(names)} differ); use its model settings, or "
            "training.start_with=shared"
        )


def shared(new: Weights, old: Weights) -> set[str]:
    """Returns the parameters of equal name and type, except those of experts and routers."""
    here, there = new.types, old.types
    return {
        name
        for name, kind in here.items()
        if there.get(name) == kind and name.startswith(_PARAMS) and not _SPARSE.search(name)
    }


@dataclasses.dataclass(frozen=True)
class Transplant:
    """Replaces initialised weights by the weights of another model.

    Attributes:
        only_shared: True replaces only the parameters of ``shared``; False replaces all parameters
            except adapters, and the routers' state.
        model: Configuration of the new model.
        source: Configuration of the other model, which has no adapters.
    """

    only_shared: bool
    model: models.ModelConfig
    source: models.ModelConfig

    def __call__(self, state: TrainState, source: Mapping[str, Array]) -> TrainState:
        """Returns ``state`` with the weights of ``source``, by the names of ``named_leaves``."""
        leaves = named_leaves(state)
        drawn, taken = Weights(leaves, places(self.model)), Weights(source, places(self.source))
        chosen = shared(drawn, taken) if self.only_shared else _apart_from_adapters(drawn)
        return from_named_leaves(state, leaves | _moved(drawn, taken, chosen))


def _apart_from_adapters(weights: Weights) -> set[str]:
    return {name for name in weights.places if not is_adapter(name)}


def _moved(drawn: Weights, source: Weights, chosen: Collection[str]) -> dict[str, Array]:
    """Returns the leaves of ``drawn``, with the ``chosen`` arrays taken from ``source``.

    Args:
        drawn: Initialised weights of the new model.
        source: Weights of the other model.
        chosen: Names of arrays, as in ``places``.
    """
    moved: dict[str, Any] = {}
    for name, place in drawn.places.items():
        value = drawn.take(name)
        if name in chosen:
            value = _over(value, source.take(name_without_adapter(name)))
        if place.entry is None:
            moved[place.leaf] = value
        else:
            moved.setdefault(place.leaf, []).append(value)  # ``places`` has layers in order
    return {
        leaf: jnp.stack(value) if isinstance(value, list) else value
        for leaf, value in moved.items()
    }


def _over(drawn: Array, source: Array) -> Array:
    """Returns ``source`` in the type of ``drawn``; rows that ``source`` lacks keep their values."""
    source = source.astype(drawn.dtype)
    if source.shape == drawn.shape:
        return source
    return jax.lax.dynamic_update_slice(drawn, source, (0,) * drawn.ndim)
