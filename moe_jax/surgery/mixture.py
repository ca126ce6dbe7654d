"""One MoE layer as arrays whose experts can be taken, copied and left out."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moe_jax.errors import ConfigError
from moe_jax.models import SparseLayer
from moe_jax.nn.moe_config import LayerOverride, MoEConfig
from moe_jax.routing import ByToken, Forced, Hash, Linear, NoHead, Random, Router, TopK
from moe_jax.surgery.weights import LayerWeights

LayerName = str | int
"""Name of an MoE layer, as ``SparseLayer.name``: its index, behind the stack if there are two."""
UNITS = {"up": -1, "gate": -1, "down": -2, "up_bias": -1, "gate_bias": -1}
"""Axis of the hidden units in each parameter of the experts; others have no such axis."""
_Layer = TypeVar("_Layer")
_PARTS = {"experts": "params", "router": "params", "state": "router_state"}


@dataclasses.dataclass(frozen=True)
class MixtureLayer:
    """The experts and the router of one MoE layer.

    Attributes:
        moe: Configuration of this layer alone.
        width: Model width ``M``.
        experts: Parameters of the experts by name, each ``(E, ...)``.
        router: Parameters of the router by name.
        state: State of the router between steps by name.
    """

    moe: MoEConfig
    width: int
    experts: Mapping[str, Array]
    router: Mapping[str, Array]
    state: Mapping[str, Array]

    @property
    def num_experts(self) -> int:
        """The number ``E`` of experts."""
        return self.moe.num_experts

    def with_settings(self, **changes: Any) -> MixtureLayer:
        """Returns the layer with other settings, such as ``router``; the arrays stay.

        Raises:
            ConfigError: If the router cannot work with the settings.
        """
        return dataclasses.replace(self, moe=dataclasses.replace(self.moe, **changes))

    def take(self, experts: Sequence[int] | np.ndarray) -> MixtureLayer:
        """Returns the layer with the listed experts, in this order; an expert may appear again.

        The router's logits and state follow their experts. Experts without computation stay. A
        router that reads the logits of the MoE layer before still reads all of them; see
        ``with_logits_before``.

        Args:
            experts: Indices ``(E',)`` of experts.

        Raises:
            ConfigError: If the router cannot work with ``E'`` experts, such as fewer than ``k``, or
                if an expert would come to another group of neighbours.
        """
        index = np.asarray(experts, np.int32)
        router, before = self.moe.router, self.num_experts
        free = np.arange(before, before + router.free.count, dtype=np.int32)
        scored = np.concatenate([index, free])
        axes = router_axes(router, self.width, before)
        moe = dataclasses.replace(self.moe, num_experts=len(index))
        self._check_neighbours(index)
        shared = self._with_shared_primaries()
        return dataclasses.replace(
            self,
            moe=moe,
            experts={name: array[index] for name, array in self.experts.items()},
            router=_taken(shared, {name: of[-1:] for name, of in axes.items()}, scored),
            state=_taken(self.state, state_axes(router, before), scored),
        )

    @property
    def neighbour_groups(self) -> int:
        """The number of groups of neighbouring experts; see ``neighbour_groups``."""
        return neighbour_groups(self.moe.router)

    def _with_shared_primaries(self) -> dict[str, Array]:
        """Returns the router's parameters, in which the experts of a group have one primary logit.

        A group's primary logit is the mean over its experts, which experts that come or go would
        change (``TwoLevelSoftmax``). A linear map of the mean is the mean of linear maps.
        """
        router, groups = self.moe.router, self.moe.router.score.neighbour_groups()
        if groups == 1 or not isinstance(router.head, Linear):
            return dict(self.router)
        found = {}
        for name, array in self.router.items():  # ``kernel (M, E, P)`` and ``bias (E, P)``
            plane = array[..., 1].reshape(*array.shape[:-2], groups, -1)
            means = jnp.broadcast_to(plane.mean(-1, keepdims=True), plane.shape)
            found[name] = array.at[..., 1].set(means.reshape(array.shape[:-1]))
        return found

    def _check_neighbours(self, index: np.ndarray) -> None:
        """Rejects experts that would come to other groups of neighbours.

        Args:
            index: Indices ``(E',)`` of the experts, which the router can work with.
        """
        groups = self.neighbour_groups
        here = index // (self.num_experts // groups)
        if not np.array_equal(here, np.arange(len(index)) // max(len(index) // groups, 1)):
            raise ConfigError(
                f"the router compares experts within {groups} groups of neighbouring experts, "
                "and experts would come to other groups: take equally many experts of each group"
            )


def neighbour_groups(router: Router) -> int:
    """Returns the number of groups of neighbouring experts that a change has to keep; 1 for none.

    The router restricts a token to some of these groups, or its scores compare their experts.
    """
    return math.lcm(router.select.neighbour_groups(), router.score.neighbour_groups())


def router_axes(router: Router, width: int, experts: int) -> dict[str, tuple[int, ...]]:
    """Returns the axes of experts of each parameter of a router, by the parameter's name.

    Args:
        router: The router.
        width: Model width ``M``.
        experts: Number ``E`` of experts.
    """
    scored = experts + router.free.count
    here, grown = (
        {n: p.shape for n, p in router.head.parameters(width, size, router.planes).items()}
        for size in (scored, scored + 1)
    )
    return {name: _differing(here[name], grown[name]) for name in here}


def state_axes(router: Router, experts: int) -> dict[str, tuple[int, ...]]:
    """Returns the axes of experts of each array of a router's state, by the array's name."""
    here, grown = router.state_shapes(experts), router.state_shapes(experts + 1)
    return {name: _differing(here[name], grown[name]) for name in here}


def _differing(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)


def _taken(
    arrays: Mapping[str, Array], axes: Mapping[str, tuple[int, ...]], index: np.ndarray
) -> dict[str, Array]:
    found = dict(arrays)
    for name in found:
        for axis in axes[name]:
            found[name] = jnp.take(found[name], index, axis=axis)
    return found


def reads_logits(layer: SparseLayer) -> bool:
    """Returns whether the router of a layer reads the logits of the MoE layer before."""
    router, experts = layer.moe.router, layer.moe.num_experts
    return router.carried_width(experts) != router.carried_width(experts + 1)


def with_logits_before(
    weights: LayerWeights,
    changed: Mapping[LayerName, MixtureLayer],
    taken: Mapping[LayerName, Sequence[int]],
) -> dict[LayerName, MixtureLayer]:
    """Returns changed layers whose routers read the logits that the MoE layers before now have.

    The logits of an expert that is left out no longer reach the next layer.

    Args:
        weights: The model before the change.
        changed: MoE layers with the experts of ``taken``, by ``MixtureLayer.take``.
        taken: Indices of the experts of each changed layer.

    Raises:
        ConfigError: If a router reads the logits of a layer that has another number of experts.
    """
    found, before = dict(changed), dict[str, np.ndarray]()
    for layer in (layer for layer in feed_forward_layers(weights) if reads_logits(layer)):
        router, experts = layer.moe.router, layer.moe.num_experts
        own = np.asarray(taken.get(layer.name, range(experts)), np.int32)
        rows = before.get(layer.stack, own)  # the first layer reads zeros
        if len(rows) != len(own):
            raise ConfigError(
                f"the router of layer {layer.name} reads the logits of the MoE layer before: "
                f"{len(rows)} and {len(own)} experts do not fit, so keep equally many in all layers"
            )
        before[layer.stack] = own
        if layer.name in found:
            free = np.arange(experts, experts + router.free.count, dtype=np.int32)
            axes = router_axes(router, weights.model.width, experts)
            both = {name: of[:1] if len(of) > 1 else () for name, of in axes.items()}
            mixture = found[layer.name]
            read = _taken(mixture.router, both, np.concatenate([rows, free]))
            found[layer.name] = dataclasses.replace(mixture, router=read)
    return found


def check_changeable(weights: LayerWeights) -> None:
    """Rejects models whose experts cannot be taken apart.

    Raises:
        ConfigError: If the model has no experts, modules that look ahead, experts of several
            widths, or a router that does not read the tokens.
    """
    layers = feed_forward_layers(weights)
    if not layers:
        raise ConfigError("the model has no experts: upcycle it first (moe-jax upcycle)")
    if getattr(weights.model, "lookahead", 0):
        raise ConfigError(
            "the model looks ahead (model.lookahead), and its modules that look ahead use the "
            "experts of the last layer: set model.lookahead=0, or leave the modules of a trained "
            "model out (--drop_lookahead)"
        )
    check_own_logits(weights)
    for layer in layers:
        select = layer.moe.router.select
        rank = select.rank if isinstance(select, TopK) else None
        if layer.moe.expert_dims:
            raise ConfigError(
                f"layer {layer.name} has experts of several widths (expert_dims): their number "
                "cannot change one by one"
            )
        if isinstance(layer.moe.router.head, NoHead) or isinstance(
            rank or select, ByToken | Forced | Hash | Random
        ):
            raise ConfigError(
                f"the router of layer {layer.name} chooses without reading the tokens, so none of "
                "its experts can be left out or added: use a router that scores the tokens"
            )


def check_own_logits(weights: LayerWeights) -> None:
    """Rejects models in which several logits share an expert, so that none is an expert's own.

    Raises:
        ConfigError: If so.
    """
    for layer in feed_forward_layers(weights):
        if layer.moe.router.redirect:
            raise ConfigError(
                f"the experts of layer {layer.name} are merged and share the logits of their "
                "members (router.redirect): start from the model before the merge"
            )


def feed_forward_layers(weights: LayerWeights) -> list[SparseLayer]:
    """Returns the MoE layers whose experts are feed-forward networks."""
    return [layer for layer in weights.model.sparse_layers() if not layer.in_attention]


def prefix(layer: SparseLayer) -> str:
    """Returns the beginning of the names of a layer's arrays, behind the name of their tree."""
    return f"{layer.stack or 'layers'}/{layer.index}/feed_forward/"


def mixtures(weights: LayerWeights) -> dict[LayerName, MixtureLayer]:
    """Returns all MoE layers of a model, by name and in order."""
    return {
        layer.name: MixtureLayer(
            layer.moe,
            weights.model.width,
            **{part: _under(weights.arrays, layer, part) for part in _PARTS},
        )
        for layer in feed_forward_layers(weights)
    }


def neighbours_of(weights: LayerWeights) -> dict[LayerName, int]:
    """Returns the number of groups of neighbouring experts of each MoE layer."""
    return {name: mixture.neighbour_groups for name, mixture in mixtures(weights).items()}


def meant(name: LayerName, known: Collection[LayerName]) -> list[LayerName]:
    """Returns the layers that a name means; an index alone means this layer of each stack.

    Args:
        name: Name or index of a layer.
        known: Names of all layers.
    """
    if name in known:
        return [name]
    return [other for other in known if other in (f"encoder {name}", f"decoder {name}")]


def named(
    found: Mapping[LayerName, _Layer], names: Collection[LayerName]
) -> dict[LayerName, _Layer]:
    """Returns the MoE layers of these names, in the order of the names.

    Args:
        found: All MoE layers of a model by name.
        names: Names of layers; an index alone means this layer of each stack.

    Raises:
        ConfigError: If a layer has no experts, or does not exist.
    """
    for name in names:
        if not meant(name, found):
            listed = ", ".join(map(str, found))
            raise ConfigError(f"layer {name} has no experts; the MoE layers are {listed}")
    return {one: found[one] for name in names for one in meant(name, found)}


def _start(layer: SparseLayer, part: str) -> str:
    inner = "router/state" if part == "state" else part
    return f"{_PARTS[part]}/{prefix(layer)}{inner}/"


def _under(arrays: Mapping[str, Array], layer: SparseLayer, part: str) -> dict[str, Array]:
    start = _start(layer, part)
    return {n.removeprefix(start): a for n, a in arrays.items() if n.startswith(start)}


def with_mixtures(weights: LayerWeights, changed: Mapping[LayerName, MixtureLayer]) -> LayerWeights:
    """Returns the model in which the given MoE layers replace the layers of the same names.

    Raises:
        ConfigError: If a layer of this name does not exist, or a router rejects its experts.
    """
    layers = {layer.name: layer for layer in feed_forward_layers(weights)}
    named(layers, changed)
    new = {name: changed[name].moe if name in changed else layers[name].moe for name in layers}
    by_setting: dict[str, dict[int, MoEConfig]] = collections.defaultdict(dict)
    for name, layer in layers.items():
        by_setting[layer.setting][layer.index] = new[name]
    settings: dict[str, Any] = {
        setting: over_layers(getattr(weights.model, setting), of_layers)
        for setting, of_layers in by_setting.items()
    }
    model = dataclasses.replace(weights.model, **settings)
    return dataclasses.replace(with_arrays(weights, changed), model=model)


def with_arrays(weights: LayerWeights, changed: Mapping[LayerName, MixtureLayer]) -> LayerWeights:
    """Returns the model with the arrays of other MoE layers of the same shapes."""
    layers = {layer.name: layer for layer in feed_forward_layers(weights)}
    arrays = dict(weights.arrays)
    for name, mixture in changed.items():
        for part in _PARTS:
            start = _start(layers[name], part)
            arrays |= {start + inner: array for inner, array in getattr(mixture, part).items()}
    return dataclasses.replace(weights, arrays=arrays)


def over_layers(moe: MoEConfig, layers: Mapping[int, MoEConfig]) -> MoEConfig:
    """Returns settings whose ``at(layer)`` is the given configuration of each MoE layer.

    The settings of most layers become those of ``moe``, and the others overrides.

    Args:
        moe: Settings of all MoE layers.
        layers: Configuration of each layer alone; routers, numbers and widths may differ.
    """
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for index, one in layers.items():
        kind = (one.router, one.num_experts, one.expert_dim)
        kinds.setdefault(kind, []).append(index)
    usual = max(kinds, key=lambda kind: len(kinds[kind]))
    overrides = tuple(
        LayerOverride(
            tuple(members),
            None if kind[0] == usual[0] else kind[0],
            0 if kind[1] == usual[1] else kind[1],
            0 if kind[2] == usual[2] else kind[2],
        )
        for kind, members in kinds.items()
        if kind != usual
    )
    router, experts, width = usual
    return dataclasses.replace(
        moe, router=router, num_experts=experts, expert_dim=width, overrides=overrides
    )
