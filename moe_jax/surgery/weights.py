"""The weights of a model, layer by layer, whether or not the model scans its layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from moe_jax import models
from moe_jax.models import DecoderConfig, ModelConfig
from moe_jax.models.adapters import merged
from moe_jax.models.places import places
from moe_jax.training.state import named_leaves, split_model
from moe_jax.training.transplant import Weights, weight_shapes


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """A model as plain arrays; the functions of this package map one such model to another.

    Attributes:
        model: Configuration of the model.
        vocab_size: Size ``V`` of the vocabulary.
        arrays: Array of each layer by a name that does not depend on scans, such as
            ``params/layers/1/feed_forward/experts/up``.
    """

    model: ModelConfig
    vocab_size: int
    arrays: Mapping[str, Array]

    @classmethod
    def of_leaves(
        cls, model: ModelConfig, vocab_size: int, leaves: Mapping[str, Any]
    ) -> LayerWeights:
        """Returns the weights of a model from the arrays of ``named_leaves``."""
        found = Weights(leaves, places(model))
        return cls(model, vocab_size, {name: found.take(name) for name in found.places})

    @classmethod
    def of_model(cls, model: models.Model) -> LayerWeights:
        """Returns the weights of a module."""
        _, params, routers = split_model(model)
        leaves = named_leaves({"params": params, "router_state": routers})
        return cls.of_leaves(model.config, model.embedding.table[...].shape[0], leaves)

    def leaves(self) -> dict[str, Array]:
        """Returns the arrays by the names of ``named_leaves``; scanned layers are stacked."""
        found: dict[str, Any] = {}
        for name, place in places(self.model).items():
            array = self.arrays[name]
            if place.entry is None:
                found[place.leaf] = array
            else:
                found.setdefault(place.leaf, []).append(array)  # ``places`` has layers in order
        return {
            leaf: jnp.stack(value) if isinstance(value, list) else value
            for leaf, value in found.items()
        }

    def module(self) -> models.Model:
        """Returns the Flax NNX module with these weights."""
        abstract = nnx.eval_shape(lambda: models.make(self.model, self.vocab_size, nnx.Rngs(0)()))
        graph, params, routers = split_model(abstract)
        leaves = self.leaves()
        filled = [
            nnx.from_flat_state(
                {
                    path: variable.replace(leaves["/".join(map(str, (tree, *path)))])
                    for path, variable in nnx.to_flat_state(state)
                }
            )
            for tree, state in (("params", params), ("router_state", routers))
        ]
        return nnx.merge(graph, *filled)

    def merged(self) -> LayerWeights:
        """Returns the weights with adapters merged into them; without adapters, the weights."""
        return self if self.model.lora is None else LayerWeights.of_model(merged(self.module()))

    def without_lookahead(self) -> LayerWeights:
        """Returns the model without its modules that look ahead; the function is the same."""
        if not isinstance(self.model, DecoderConfig):
            return self
        model = dataclasses.replace(self.model, lookahead=0)
        return LayerWeights(
            model, self.vocab_size, {name: self.arrays[name] for name in places(model)}
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each layer's arrays that the configuration describes."""
        described = weight_shapes(self.model, self.vocab_size)
        found = {}
        for name, place in described.places.items():
            shape = described.leaves[place.leaf].shape
            found[name] = shape if place.entry is None else shape[1:]
        return found

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(a.size for name, a in self.arrays.items() if name.startswith("params/"))
