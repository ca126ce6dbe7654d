"""One growth of all or some MoE layers of a model, on weights or on the configuration alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from moe_jax.errors import ConfigError, nearest
from moe_jax.models import ModelConfig
from moe_jax.surgery.grow import Grown, copied, perturbed, split, widened, with_copies
from moe_jax.surgery.mixture import (
    LayerName,
    MixtureLayer,
    check_changeable,
    feed_forward_layers,
    mixtures,
    named,
    reads_logits,
    with_arrays,
    with_mixtures,
)
from moe_jax.surgery.weights import LayerWeights
from moe_jax.training.transplant import weight_shapes

_ROWS = 8  # Rows of an embedding whose size no growth reads.


@dataclasses.dataclass(frozen=True)
class Growth:
    """A change to more or wider experts, in exactly one of four ways.

    Attributes:
        copies: Number of copies of each expert, of which a token chooses all.
        parts: Number of parts into which each expert is cut.
        hidden: New hidden width of the experts.
        copy: Indices of experts that get one more copy; ``k`` stays.
        layers: Names of the layers that change; empty for all layers.
        noise: Deviation of the noise on each array of experts and router, as a share of the
            deviation of the array.
        seed: Seed of noise and new units.
    """

    copies: int = 0
    parts: int = 0
    hidden: int = 0
    copy: Sequence[int] = ()
    layers: Sequence[LayerName] = ()
    noise: float = 0.0
    seed: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Growth:
        """Returns the growth with these values by name.

        Raises:
            ConfigError: If a name is unknown, or not exactly one way is given.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise ConfigError(
                    f"a growth has no {name!r}{nearest(name, names)}: use {', '.join(names)}"
                )
        growth = cls(**values)
        growth.way()
        return growth

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return " ".join(f"{name}={value}" for name, value in given.items() if value)

    def way(self) -> Callable[[MixtureLayer], Grown]:
        """Returns the change of one layer without noise.

        Raises:
            ConfigError: If none or several ways are given.
        """
        key = jax.random.key(self.seed)
        ways: dict[str, tuple[object, Callable[[MixtureLayer], Grown]]] = {
            "copies": (self.copies, functools.partial(copied, factor=self.copies)),
            "parts": (self.parts, functools.partial(split, factor=self.parts)),
            "hidden": (self.hidden, functools.partial(widened, hidden=self.hidden, key=key)),
            "copy": (self.copy, functools.partial(with_copies, experts=self.copy)),
        }
        chosen = [way for given, way in ways.values() if given]
        if len(chosen) != 1:
            raise ConfigError(f"give exactly one of {', '.join(ways)}: {len(chosen)} are given")
        return chosen[0]

    def layers_of(self, weights: LayerWeights) -> dict[LayerName, Grown]:
        """Returns the layers that change, without noise, by name and in the order of the model.

        Raises:
            ConfigError: If the experts of the model cannot change, or a router cannot work with
                the larger number.
        """
        way = self.way()
        check_changeable(weights)
        for layer in filter(reads_logits, feed_forward_layers(weights)):
            if not self.hidden:
                raise ConfigError(
                    f"the router of layer {layer.name} reads the logits of the MoE layer before, "
                    "so no experts can be added: widen the experts, or use another router"
                )
        found = mixtures(weights)
        chosen = named(found, self.layers or tuple(found))
        return {name: way(mixture) for name, mixture in found.items() if name in chosen}

    def __call__(self, weights: LayerWeights) -> tuple[LayerWeights, str]:
        """Returns the larger model, and the reason for which its function differs, or "".

        Raises:
            ConfigError: See ``layers_of``.
        """
        grown = self.layers_of(weights)
        new = {name: one.mixture for name, one in grown.items()}
        differences = [one.reason for one in grown.values()]
        if self.noise:
            key, order = jax.random.key(self.seed), list(mixtures(weights))
            new = {
                name: perturbed(mixture, self.noise, jax.random.fold_in(key, order.index(name)))
                for name, mixture in new.items()
            }
            differences.append(f"noise={self.noise:g}")
        return with_mixtures(weights, new), next(filter(None, differences), "")

    def average(self, tree: str, average: LayerWeights, weights: LayerWeights) -> LayerWeights:
        """Returns a grown average of the parameters; see ``FollowedChange``."""
        del tree, weights
        return self(average)[0]

    def moments(self, tree: str, moments: LayerWeights, weights: LayerWeights) -> LayerWeights:
        """Returns the moments of the larger model; see ``FollowedChange``."""
        del tree
        here = mixtures(moments)
        followed = {n: one.follow(here[n]) for n, one in self.layers_of(weights).items()}
        return with_arrays(moments, followed)

    def model(self, model: ModelConfig) -> ModelConfig:
        """Returns the configuration of the larger model, without computing its weights.

        Raises:
            ConfigError: See ``layers_of``.
        """
        found: list[ModelConfig] = []

        def grow(leaves: Mapping[str, Any]) -> Mapping[str, Any]:
            weights, _ = self(LayerWeights.of_leaves(model, _ROWS, leaves))
            found.append(weights.model)
            return weights.arrays

        jax.eval_shape(grow, dict(weight_shapes(model, _ROWS).leaves))
        return found[0]
