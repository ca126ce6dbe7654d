"""Names of the arrays of each layer of a configuration, with or without scans."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
from flax import nnx

from moe_jax import models


@dataclasses.dataclass(frozen=True)
class WeightPath:
    """The location of one layer's array in a state.

    Attributes:
        leaf: Name of the leaf.
        entry: Index of the layer on the leaf's leading axis; ``None`` if layers are not stacked.
    """

    leaf: str
    entry: int | None = None


@functools.lru_cache
def places(model: models.ModelConfig) -> Mapping[str, WeightPath]:
    """Returns the location of each layer's weights, by a name that does not depend on scans.

    If a scan repeats a pattern of two blocks twice, ``params/layers/parts/0/1/attention/query``
    holds ``params/layers/1/attention/query`` and ``params/layers/3/attention/query``.
    """
    abstract = jax.eval_shape(lambda: models.make(model, 1, jax.random.key(0)))
    learnt = dict(nnx.to_flat_state(nnx.state(abstract, nnx.Param)))
    locations = {}
    for path, stored in models.stored(abstract).items():
        tree = "params" if stored.path in learnt else "router_state"
        leaf, name = ("/".join(map(str, (tree, *keys))) for keys in (stored.path, path))
        locations[name] = WeightPath(leaf, stored.entry)
    return locations
