"""Groups of a model's arrays: parts such as ``router``, layers such as ``layers/0``, and both."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

from moe_jax.errors import ConfigError, nearest
from moe_jax.models.adapters import is_adapter
from moe_jax.models.config import ModelConfig
from moe_jax.models.parts import groups_of
from moe_jax.models.places import places


def leaves_in(model: ModelConfig, groups: Iterable[str], setting: str) -> frozenset[str]:
    """Returns the names of the leaves of a state that hold the arrays of groups.

    The state of routers, such as the bias of loss-free balancing, is in the group of its router.

    Args:
        model: Configuration of the model.
        groups: Names of groups.
        setting: Name of the setting, for messages.

    Raises:
        ConfigError: If the model has no such group, or a scan holds an array of the groups in one
            leaf with another.
    """
    wanted, known = set(groups), {name: groups_of(name) for name in places(model)}
    found = set().union(*known.values())
    for group in sorted(wanted - found):
        raise ConfigError(f"{setting} has no group {group!r}{_listed(group, found)}")
    inside = collections.defaultdict(list)
    for name, place in places(model).items():
        inside[place.leaf].append((name, not wanted.isdisjoint(known[name])))
    for members in inside.values():
        of_layers = {chosen: name for name, chosen in members}
        if len(of_layers) == 2:
            raise ConfigError(
                f"{setting} has {of_layers[True]} and not {of_layers[False]}, which a scan holds "
                "in one array: set model.scan_layers=False, or name both layers"
            )
    return frozenset(leaf for leaf, members in inside.items() if members[0][1])


def check_adapters(model: ModelConfig) -> None:
    """Rejects adapters of groups that the model lacks, or that hold no projection.

    Raises:
        ConfigError: If so, or a scan holds an array with an adapter in one leaf with another.
    """
    if model.lora is None:
        return
    setting, groups = "model.lora.groups", model.lora.groups
    if not groups:
        raise ConfigError(f"{setting} is empty: name groups, such as experts,attention")
    leaves_in(dataclasses.replace(model, lora=None), groups, setting)
    adapted = set().union(*(groups_of(name) for name in places(model) if is_adapter(name)))
    for group in sorted(set(groups) - adapted):
        raise ConfigError(
            f"{setting} has {group!r}, in which no projection can have an adapter: leave it out"
        )


def leaves_without_adapters(model: ModelConfig) -> frozenset[str]:
    """Returns the names of the leaves of a state that hold no adapter."""
    leaves = {place.leaf for place in places(model).values()}
    return frozenset(leaf for leaf in leaves if not is_adapter(leaf))


def _listed(group: str, known: Iterable[str]) -> str:
    """Returns the end of a message about an unknown group, with the known ones."""
    plain = [name for name in known if "/" not in name]
    layers = sorted(name.split("/") for name in known if name.count("/") == 1)
    last: dict[str, int] = {}
    for stack, index in layers:
        last[stack] = max(last.get(stack, 0), int(index))
    listed = ", ".join(f"{stack}/0 to {stack}/{index}" for stack, index in last.items())
    return f"{nearest(group, plain)}, {listed}, and parts of layers such as {layers[0][0]}/0/norms"
