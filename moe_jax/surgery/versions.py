"""The arrays of one expert: hash, change and exchange."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from moe_jax.errors import ConfigError
from moe_jax.surgery.mixture import (
    LayerName,
    MixtureLayer,
    mixtures,
    router_axes,
    state_axes,
    with_arrays,
)
from moe_jax.surgery.weights import LayerWeights

_GROUP = "groups"  # Experts of several widths: ``groups/1/up`` holds those of the second width.


def on_host(mixture: MixtureLayer) -> MixtureLayer:
    """Returns the layer with its arrays as NumPy arrays, whose rows are read without a device."""
    return dataclasses.replace(
        mixture,
        experts=jax.tree.map(np.asarray, mixture.experts),
        router=jax.tree.map(np.asarray, mixture.router),
        state=jax.tree.map(np.asarray, mixture.state),
    )


def network_of(mixture: MixtureLayer, expert: int) -> dict[str, Array]:
    """Returns the parameters of the network of one expert by name, without the axis of experts."""
    rows = ((name, _row(name, array, expert)) for name, array in mixture.experts.items())
    return {name: mixture.experts[name][row] for name, row in rows if row is not None}


def router_of(mixture: MixtureLayer, expert: int) -> dict[str, Array]:
    """Returns the parameters and the state of the router that belong to one expert, by name."""
    found = {}
    for part, axes in _axes(mixture).items():
        for name, array in getattr(mixture, part).items():
            for axis in reversed(axes[name]):
                found[f"{part}/{name}"] = np.take(np.asarray(array), expert, axis=axis)
                array = found[f"{part}/{name}"]
    return found


def digest(arrays: Mapping[str, Array]) -> str:
    """Returns a hash of names, shapes and float32 values in 16 hexadecimal digits."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name], "<f4")
        found.update(f"{name}{array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()[:16]


def relative_change(before: Mapping[str, Array], after: Mapping[str, Array]) -> float:
    """Returns the norm of the change of some arrays, divided by their norm before.

    The result is 0 if and only if all numbers are equal, and infinite for a change of zeros.
    """
    both = ((before[name], after[name]) for name in before)
    pairs = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in both]
    change = np.sqrt(sum(np.sum((y - x) ** 2) for x, y in pairs))
    norm = np.sqrt(sum(np.sum(x**2) for x, _ in pairs))
    return 0.0 if change == 0 else float(np.divide(change, norm)) if norm else float("inf")


def with_experts_of(
    mixture: MixtureLayer, donor: MixtureLayer, experts: Collection[int], *, router: bool
) -> MixtureLayer:
    """Returns the layer with some experts of another layer of the same shapes.

    Args:
        mixture: The layer.
        donor: The other layer.
        experts: Indices of experts.
        router: True also takes what belongs to these experts in router and state.
    """
    parts: dict[str, Any] = {"experts": dict(mixture.experts)}
    for expert in experts:
        for name, array in parts["experts"].items():
            row = _row(name, array, expert)
            if row is not None:
                parts["experts"][name] = array.at[row].set(donor.experts[name][row])
    if router:
        index = np.array(sorted(experts))
        for part, axes in _axes(mixture).items():
            theirs = getattr(donor, part)
            parts[part] = {
                name: _exchanged(array, theirs[name], axes[name], index)
                for name, array in getattr(mixture, part).items()
            }
    return dataclasses.replace(mixture, **parts)


@dataclasses.dataclass(frozen=True)
class Taking:
    """A change that takes experts from another model, as a ``FollowedChange``.

    Attributes:
        donors: Parameters of the other model under ``params``, and moments and average of its
            optimizer under their names in the state.
        layers: Names of the layers whose experts are taken.
        experts: Indices of experts.
        router: True also takes what belongs to these experts in router and state.
        other: Name of the other model.
    """

    donors: Mapping[str, LayerWeights]
    layers: Collection[LayerName]
    experts: Collection[int]
    router: bool
    other: str

    def __call__(self, weights: LayerWeights) -> tuple[LayerWeights, str]:
        """Returns the model with the taken experts, and why its function differs."""
        return self._taken("params", weights), f"experts are taken from {self.other}"

    def average(self, tree: str, average: LayerWeights, weights: LayerWeights) -> LayerWeights:
        """Returns the average with the taken experts of the other run's average."""
        del weights
        return self._taken(tree, average)

    def moments(self, tree: str, moments: LayerWeights, weights: LayerWeights) -> LayerWeights:
        """Returns the moments with the taken experts' moments of the other run."""
        del weights
        return self._taken(tree, moments)

    def _taken(self, tree: str, arrays: LayerWeights) -> LayerWeights:
        here = mixtures(arrays)
        there = mixtures(self.donors[tree]) if tree in self.donors else {}
        new = {}
        for name in self.layers:
            if name not in there or not _names(there[name]) >= _names(here[name]):
                raise ConfigError(
                    f"{self.other} has other moments than this run ({tree}): use --optimizer=new, "
                    "or runs of one optimizer"
                )
            donor = on_host(there[name])
            new[name] = with_experts_of(here[name], donor, self.experts, router=self.router)
        return with_arrays(arrays, new)


def check_same_experts(
    here: Mapping[LayerName, MixtureLayer], there: Mapping[LayerName, MixtureLayer], other: str
) -> None:
    """Rejects two models whose MoE layers differ in an array's shape.

    Raises:
        ConfigError: If so, or if there are no MoE layers.
    """
    one, two = _shapes(here), _shapes(there)
    if not one:
        raise ConfigError("the model has no experts: upcycle it first (moe-jax upcycle)")
    for name in [*one, *two]:
        if one.get(name) != two.get(name):
            raise ConfigError(
                f"{other} has other experts: {name} is {two.get(name, 'absent')} there and "
                f"{one.get(name, 'absent')} here; use a model of the same shape"
            )


def _names(mixture: MixtureLayer) -> set[str]:
    parts = ("experts", "router", "state")
    return {f"{part}/{name}" for part in parts for name in getattr(mixture, part)}


def _shapes(layers: Mapping[LayerName, MixtureLayer]) -> dict[str, tuple[int, ...]]:
    return {
        f"layer {layer} {part}/{name}": array.shape
        for layer, mixture in layers.items()
        for part in ("experts", "router", "state")
        for name, array in getattr(mixture, part).items()
    }


def _axes(mixture: MixtureLayer) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns the axes of experts of router and state, by part and name."""
    router, experts = mixture.moe.router, mixture.num_experts
    return {
        "router": router_axes(router, mixture.width, experts),
        "state": state_axes(router, experts),
    }


def _row(name: str, array: Array, expert: int) -> int | None:
    """Returns the row of an expert in a stack of experts, or ``None`` if it is in another stack."""
    first, *rest = name.split("/")
    start = int(rest[0]) * len(array) if first == _GROUP else 0
    return expert - start if start <= expert < start + len(array) else None


def _exchanged(array: Array, other: Array, axes: tuple[int, ...], index: np.ndarray) -> Array:
    for axis in axes:
        place = (slice(None),) * axis + (index,)
        array = array.at[place].set(other[place])
    return array
