"""Where the copies of experts go, by their loads, so that devices have about equal loads.

The rules are those of DeepSeek's expert-parallel load balancer (EPLB, 2412.19437 section 3.4):
experts with the largest load per copy get the next copy, and copies are packed onto devices from
the largest load down.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, Int

from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, EncoderDecoder
from moe_jax.nn.copies import CopiesLayer
from moe_jax.nn.feed_forward import MixedExperts
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.parallel import sharding_of
from moe_jax.routing import Copies


def packed(load: Float[np.ndarray, " N"], packs: int) -> Int[np.ndarray, "packs N_per_pack"]:
    """Returns the items of each pack: all packs have equally many items.

    Each item goes, from the largest load down, to the pack with the smallest load that has room.

    Args:
        load: Load of each item.
        packs: Number of packs, which divides the number of items.
    """
    room = len(load) // packs
    if room == 1:
        return np.arange(packs)[:, None]
    items: list[list[int]] = [[] for _ in range(packs)]
    total = np.zeros(packs)
    for item in np.argsort(-load, kind="stable"):
        open_packs = [pack for pack in range(packs) if len(items[pack]) < room]
        pack = min(open_packs, key=lambda pack: total[pack])
        items[pack].append(int(item))
        total[pack] += load[item]
    return np.array(items)


def copied(load: Float[np.ndarray, " E"], places: int) -> Int[np.ndarray, " places"]:
    """Returns the expert in each place; the first ``E`` places hold one copy of each expert.

    Each further copy is one of the expert with the largest load per copy.
    """
    copies = np.ones(len(load))
    experts = list(range(len(load)))
    for _ in range(places - len(load)):
        busiest = int(np.argmax(load / copies))
        experts.append(busiest)
        copies[busiest] += 1
    return np.array(experts)


def place(
    load: Float[np.ndarray, " E"],
    places: int,
    devices: int,
    *,
    groups: int = 1,
    nodes: int = 1,
) -> Int[np.ndarray, " places"]:
    """Returns the expert in each place of one MoE layer; a device has neighbouring places.

    With ``groups`` that the nodes divide, the experts of a group stay on one node, as the router's
    group limit needs; otherwise copies go to any device.

    Args:
        load: Measured load ``(E,)`` of each expert, in any unit.
        places: Number of places on all devices together, at least ``E``.
        devices: Number of devices along the expert axis.
        groups: Number of groups of neighbouring experts.
        nodes: Number of nodes.

    Raises:
        ConfigError: If the numbers do not divide, or there are fewer places than experts.

    Examples:
        Expert 0 has most of the load of 4 experts and gets both further places:

        >>> import moe_jax.serving as serving
        >>> serving.place([9.0, 1.0, 1.0, 1.0], places=6, devices=2).tolist()
        [0, 0, 1, 0, 2, 3]
    """
    load = np.asarray(load, np.float64)
    if groups % nodes:
        groups, nodes = 1, 1
    _check(len(load), places, devices, groups, nodes)
    size = len(load) // groups
    of_node = packed(load.reshape(groups, size).sum(1), nodes)
    found = []
    for node in of_node:
        experts = (node[:, None] * size + np.arange(size)).reshape(-1)
        copies = copied(load[experts], places // nodes)
        number = np.bincount(copies, minlength=len(experts))
        share = (load[experts] / number)[copies]
        found.append(experts[copies[packed(share, devices // nodes).reshape(-1)]])
    return np.concatenate(found).astype(np.int32)


def _check(experts: int, places: int, devices: int, groups: int, nodes: int) -> None:
    if places < experts:
        raise ConfigError(f"{experts} experts need at least {experts} places, found {places}")
    for number, what, by, divisor in (
        (places, "places", "devices", devices),
        (experts, "experts", "groups", groups),
        (devices, "devices", "nodes", nodes),
    ):
        if number % divisor:
            raise ConfigError(f"{number} {what} do not divide into {divisor} {by}: change one")


def device_loads(
    load: Float[np.ndarray, " E"], expert: Int[np.ndarray, " P"], devices: int
) -> Float[np.ndarray, " devices"]:
    """Returns the load of each device if the copies of an expert share its load evenly.

    Args:
        load: Load of each expert.
        expert: Expert in each place, from ``place``.
        devices: Number of devices.

    Examples:
        >>> import moe_jax.serving as serving
        >>> serving.device_loads([9.0, 1.0, 1.0, 1.0], [0, 0, 1, 0, 2, 3], devices=2).tolist()
        [7.0, 5.0]
    """
    expert, load = np.asarray(expert), np.asarray(load)
    share = load / np.bincount(expert, minlength=len(load))
    return share[expert].reshape(devices, -1).sum(1)


def copy_experts(model: Decoder | EncoderDecoder, experts: Sequence[Int[np.ndarray, " P"]]) -> None:
    """Puts the experts of a model into places, in place of what the places held before.

    The outputs stay the same. A compiled program of the model is reused for other experts in the
    same number of places.

    Args:
        model: Model whose tokens choose experts.
        experts: Expert in each place, for every MoE layer in the order of the model's reports.

    Raises:
        ConfigError: If the number of layers differs, stacked layers have different numbers of
            places, or the experts of a layer cannot have copies.
    """
    found = _mixtures(model)
    wanted = sum(len(mixture.reports) for mixture in found)
    if len(experts) != wanted:
        raise ConfigError(
            f"the model has {wanted} MoE layers and the experts of {len(experts)} are given: give "
            "one list for each layer"
        )
    chosen = [_copies(mixture, experts) for mixture in found]
    for mixture, copies in zip(found, chosen, strict=True):
        _put(mixture.layer, copies)


def numbers_of_experts(model: Decoder | EncoderDecoder) -> list[int]:
    """Returns the number of experts of each MoE layer, in the order of the model's reports."""
    found = {i: each.layer.config.num_experts for each in _mixtures(model) for i in each.reports}
    return [found[i] for i in sorted(found)]


@dataclasses.dataclass(frozen=True)
class _Mixtures:
    """A module with the arrays of one MoE layer, or of several that are stacked.

    Attributes:
        layer: The module.
        stacked: True if its arrays have a leading axis.
        reports: Index of the report of each layer.
    """

    layer: ConfiguredMoE
    stacked: bool
    reports: list[int] = dataclasses.field(default_factory=list)


def _mixtures(model: Decoder | EncoderDecoder) -> list[_Mixtures]:
    stacks = (model.layers,) if isinstance(model, Decoder) else (model.encoder, model.decoder)
    found: dict[int, _Mixtures] = {}
    reports = itertools.count()
    for view in itertools.chain.from_iterable(stack.layers() for stack in stacks):
        for layer in view.block.mixtures.values():
            mixture = found.setdefault(id(layer), _Mixtures(layer, view.entry is not None))
            mixture.reports.append(next(reports))
    return list(found.values())


def _copies(mixture: _Mixtures, experts: Sequence[Int[np.ndarray, " P"]]) -> Copies:
    config = mixture.layer.config
    if config.router.experts_choose or config.exchange_buffer is not None:
        raise ConfigError(
            "copies of experts need tokens that choose experts and model.moe.exchange_buffer=None: "
            "change the router or the buffer"
        )
    if isinstance(mixture.layer.experts, MixedExperts):
        raise ConfigError("experts of several widths (model.moe.expert_dims) cannot have copies")
    rows = [np.asarray(experts[i], np.int32) for i in mixture.reports]
    if len({len(row) for row in rows}) > 1:
        raise ConfigError("equal layers are stacked and need equally many places: give as many")
    return Copies.of(np.stack(rows) if mixture.stacked else rows[0], config.num_experts)


def _put(layer: ConfiguredMoE, copies: Copies) -> None:
    """Moves the weights of the experts to their places."""
    source = copies.expert
    if layer.copies is not None:
        first = layer.copies.copies.place[..., 0]
        source = jnp.take_along_axis(first, copies.expert, axis=-1)
    take = jax.vmap(operator.getitem) if source.ndim > 1 else operator.getitem
    for _, variable in nnx.iter_graph(layer.experts):
        if isinstance(variable, nnx.Variable):
            value = variable.get_value()
            moved = take(value, source)
            if isinstance(value.sharding, NamedSharding):
                mesh = value.sharding.mesh
                assert isinstance(mesh, Mesh)
                moved = jax.device_put(moved, sharding_of(variable, moved.shape, mesh))
            variable.set_value(moved)
    layer.copies = CopiesLayer(copies)
