"""Quantises the weights of experts, with a precision for each expert; the rest of a model stays."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from moe_jax import models
from moe_jax.errors import ConfigError
from moe_jax.nn.feed_forward import Experts, MixedExperts
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.quantised.codes import Codes, Precision, factors_of, quantise, size_of_expert
from moe_jax.quantised.packed import PackedLeaves, QuantisedArray
from moe_jax.surgery.evidence import Batch, Observing, Routed, observe
from moe_jax.surgery.mixture import LayerName, feed_forward_layers, prefix
from moe_jax.surgery.weights import LayerWeights
from moe_jax.training.transplant import places

Precisions = Mapping[LayerName, tuple[Precision, ...]]
Activity = Mapping[str, Float[np.ndarray, "E I"]]
PerExpert = Mapping[LayerName, Float[np.ndarray, " E"]]
_MATRIX = re.compile(r"(?:groups/(\d+)/)?(up|gate|down)")


@dataclasses.dataclass(frozen=True)
class ExpertMatrix:
    """One linear map of the experts of a layer, or of those of one width.

    Attributes:
        name: Name of the array ``(E, I, O)`` in ``LayerWeights``.
        layer: Name of the layer.
        first: Index of the first expert.
        shape: Numbers ``(E, I, O)`` of experts, input and output channels.
        side: ``in`` if the map reads tokens, ``hidden`` if it reads hidden units.
        width: Index of the width of the experts; 0 if all have one width.
    """

    name: str
    layer: LayerName
    first: int
    shape: tuple[int, int, int]
    side: str
    width: int

    @property
    def experts(self) -> slice:
        """Indices of the experts in the layer."""
        return slice(self.first, self.first + self.shape[0])


def expert_matrices(weights: LayerWeights) -> list[ExpertMatrix]:
    """Returns the linear maps of all experts; biases are left out.

    Raises:
        ConfigError: If the model has no experts that are feed-forward networks.
    """
    found = []
    for layer in feed_forward_layers(weights):
        start = f"params/{prefix(layer)}experts/"
        for name, array in weights.arrays.items():
            match = _MATRIX.fullmatch(name.removeprefix(start)) if name.startswith(start) else None
            if match:
                width, size = int(match[1] or 0), array.shape[0]
                side = "hidden" if match[2] == "down" else "in"
                shape = array.shape[0], array.shape[1], array.shape[2]
                found.append(ExpertMatrix(name, layer.name, width * size, shape, side, width))
    if not found:
        raise ConfigError(
            "the model has no experts to quantise: upcycle it first (moe-jax upcycle)"
        )
    return found


def check_group(weights: LayerWeights, group: int) -> None:
    """Rejects a group that does not divide the input channels of a linear map.

    Raises:
        ConfigError: If so, or if the group is negative.
    """
    for matrix in expert_matrices(weights):
        if group < 0 or (group and matrix.shape[1] % group):
            raise ConfigError(
                f"group={group} does not divide the {matrix.shape[1]} input channels of "
                f"{matrix.name}: use a divisor, or 0 for one scale per output channel"
            )


def uniform(weights: LayerWeights, precision: Precision) -> dict[LayerName, tuple[Precision, ...]]:
    """Returns one precision for all experts, without those of modules that look ahead."""
    named = {matrix.layer for matrix in expert_matrices(weights)}
    layers = [layer for layer in feed_forward_layers(weights) if layer.name in named]
    return {layer.name: (precision,) * layer.moe.num_experts for layer in layers}


def quantised(
    weights: LayerWeights,
    precisions: Precisions,
    group: int = 0,
    activity: Activity | None = None,
) -> PackedLeaves:
    """Returns the quantised weights of all experts.

    Args:
        weights: The model.
        precisions: Precision of each expert, by layer.
        group: Number of input channels that share a scale; 0 for all.
        activity: Mean magnitude ``(E, I)`` of the input channels of each linear map, by the name of
            its array, from which factors are computed; ``None`` for no factors.

    Raises:
        ConfigError: If the model has no experts, or the group does not divide a width.
    """
    check_group(weights, group)
    arrays = {}
    for matrix in expert_matrices(weights):
        of_experts = precisions[matrix.layer][matrix.experts]
        seen = None if activity is None else jnp.asarray(activity[matrix.name], jnp.float32)
        arrays[matrix.name] = _array(weights.arrays[matrix.name], of_experts, group, seen)
    return PackedLeaves(arrays, _leaves(weights, arrays))


def _array(
    array: Float[Array, "E I O"],
    precisions: tuple[Precision, ...],
    group: int,
    activity: Float[Array, "E I"] | None,
) -> QuantisedArray:
    parts: dict[Precision, tuple[tuple[int, ...], Codes]] = {}
    for precision in dict.fromkeys(precisions):
        experts = tuple(e for e, other in enumerate(precisions) if other == precision)
        index = np.asarray(experts)
        chosen = array if len(experts) == len(precisions) else array[index]
        factors = None
        if activity is not None:
            factors = factors_of(chosen, activity[index], precision, group)
        parts[precision] = experts, quantise(chosen, precision, group, factors)
    return QuantisedArray(parts)


def _leaves(weights: LayerWeights, arrays: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """Returns the names of the layers' arrays in each array of a state."""
    leaves: dict[str, str | list[str]] = {}
    for name, place in places(weights.model).items():
        if name in arrays and place.entry is None:
            leaves[place.leaf] = name
        elif name in arrays:
            stack = leaves.setdefault(place.leaf, [])
            assert isinstance(stack, list)  # a leaf is a stack or not
            stack.append(name)
    return leaves


def with_codes(weights: LayerWeights, packed: PackedLeaves) -> LayerWeights:
    """Returns the model with the weights that the codes stand for."""
    new = {
        name: jnp.asarray(array.weights(), weights.arrays[name].dtype)
        for name, array in packed.arrays.items()
    }
    return dataclasses.replace(weights, arrays={**weights.arrays, **new})


def sizes(
    weights: LayerWeights, precision: Precision, group: int = 0, *, factors: bool = False
) -> dict[LayerName, Float[np.ndarray, " E"]]:
    """Returns the number of bytes ``(E,)`` of each expert at a precision, by layer.

    Args:
        weights: The model.
        precision: Precision of the codes.
        group: Number of input channels that share a scale; 0 for all.
        factors: True if each input channel has a factor.
    """
    layers = feed_forward_layers(weights)
    found = {layer.name: np.zeros(layer.moe.num_experts) for layer in layers}
    for matrix in expert_matrices(weights):
        size = size_of_expert(matrix.shape[1:], precision, group, factors=factors)
        found[matrix.layer][matrix.experts] += size
    return found


class _Active(Observing):
    """Measures the sum of the magnitudes of each input channel."""

    def observed(self, routed: Routed) -> dict[str, Array]:
        found: dict[str, Array] = {"load": routed.filled.sum(-1)}
        inputs, _ = self.applied(routed)
        networks = _networks(self.experts)
        for index, (network, x, filled) in enumerate(
            zip(
                networks,
                jnp.split(inputs, len(networks)),
                jnp.split(routed.filled, len(networks)),
                strict=True,
            )
        ):
            sides = {"in": x, "hidden": network.hidden(x)}
            for side, values in sides.items():
                magnitude = jnp.where(filled[..., None], jnp.abs(values), 0)
                found[f"{side}/{index}"] = magnitude.astype(jnp.float32).sum(1)
        return found


def _networks(experts: nnx.Module) -> list[Experts]:
    if isinstance(experts, MixedExperts):
        return list(experts.groups)
    assert isinstance(experts, Experts)  # ``observe`` measures no other experts.
    return [experts]


def activity_of(weights: LayerWeights, batches: Iterable[Batch]) -> dict[str, np.ndarray]:
    """Returns the mean magnitude ``(E, I)`` of the input channels of each linear map, by its name.

    The mean is over the tokens of an expert, with a slot for every choice; it is 0 for an expert
    without tokens.

    Args:
        weights: The model.
        batches: Batches of ``moe_jax.data``.

    Raises:
        ConfigError: If a layer has soft slots, or there is no batch.
    """
    sums = observe(weights, _Active, batches)
    return {
        matrix.name: sums[matrix.layer][f"{matrix.side}/{matrix.width}"]
        / np.maximum(sums[matrix.layer]["load"][matrix.experts, None], 1)
        for matrix in expert_matrices(weights)
    }


class _Compared(Observing):
    """Measures the error of the outputs of other experts in the place of its own."""

    others: nnx.List

    def observed(self, routed: Routed) -> dict[str, Array]:
        inputs, factor = self.applied(routed)
        weight = factor[..., None]
        outputs = self.experts(inputs).astype(jnp.float32)
        energy = jnp.square(weight * outputs).sum((1, 2))
        errors = {
            f"error/{index}": jnp.square(weight * (outputs - other(inputs))).sum((1, 2))
            for index, other in enumerate(self.others)
        }
        return {"energy": energy, **errors}


def output_errors(
    weights: LayerWeights, others: Iterable[LayerWeights], batches: Iterable[Batch]
) -> list[dict[LayerName, Float[np.ndarray, " E"]]]:
    """Returns the share of a layer's output that each expert's error is, for each other model.

    The share ``(E,)`` is the sum over the tokens of an expert of the squared error of its weighted
    output, divided by the sum of the squared weighted outputs of all experts of the layer. Every
    layer reads what the model, and not the other model, computes.

    Args:
        weights: The model.
        others: Models with other weights of the experts.
        batches: Batches of ``moe_jax.data``.

    Raises:
        ConfigError: If a layer has soft slots, or there is no batch.
    """
    modules = [other.module() for other in others]

    def prepare(model: models.Model) -> None:
        for one, *rest in zip(*map(_layers, (model, *modules)), strict=True):
            one.others = nnx.List([layer.experts for layer in rest])

    sums = observe(weights, _Compared, batches, prepare)
    tiny = np.finfo(np.float64).tiny
    return [
        {name: of[f"error/{index}"] / max(of["energy"].sum(), tiny) for name, of in sums.items()}
        for index in range(len(modules))
    ]


def _layers(model: models.Model) -> list[Any]:
    return [m for _, m in nnx.iter_modules(model) if type(m) is ConfiguredMoE]


@dataclasses.dataclass(frozen=True)
class PrecisionChoice:
    """Two precisions and their cost, from which each expert gets one.

    Attributes:
        low: Precision of fewer bytes.
        high: Precision of more bytes.
        gain: Error ``(E,)`` that the higher precision saves, by layer.
        low_size: Bytes ``(E,)`` at the lower precision, by layer.
        high_size: Bytes ``(E,)`` at the higher precision, by layer.
    """

    low: Precision
    high: Precision
    gain: PerExpert
    low_size: PerExpert
    high_size: PerExpert

    def within(self, budget: int) -> dict[LayerName, tuple[Precision, ...]]:
        """Returns the precision of each expert; the largest gains per byte get the higher one.

        Args:
            budget: Largest number of bytes of all experts.

        Raises:
            ConfigError: If the lower precision of all experts takes more bytes.
        """
        left = budget - sum(float(size.sum()) for size in self.low_size.values())
        if left < 0:
            raise ConfigError(
                f"budget={budget} bytes is below the {budget - left:.0f} bytes of {self.low} for "
                "all experts: raise it"
            )
        chosen = {name: [self.low] * len(gain) for name, gain in self.gain.items()}
        extra = {name: self.high_size[name] - size for name, size in self.low_size.items()}
        ranked = sorted(
            (-gain / max(extra[name][e], 1), order, e, name)
            for order, (name, gains) in enumerate(self.gain.items())
            for e, gain in enumerate(gains)
            if gain > 0
        )
        for _, _, expert, name in ranked:
            if extra[name][expert] <= left:
                left -= extra[name][expert]
                chosen[name][expert] = self.high
        return {name: tuple(of) for name, of in chosen.items()}
