"""Groups of a model's arrays: parts such as ``router``, layers such as ``layers/0``, and both."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable

from moe_jax.errors import ConfigError, nearest
from moe_jax.models.config import ModelConfig
from moe_jax.models.places import places

# The first pattern that a name matches determines the part.
_PARTS = {
    "router": r"/router/",
    "experts": r"/(experts|free)/",
    "shared": r"/shared/",
    "norms": r"norm/|norm$|/output_scale$",
    "attention": r"/(attention|attention_experts|cross|\w+_bias)/",
    "latent": r"/latent/",
    "dense": r"/(feed_forward|extra)/",
    "head": r"/embedding/head$",
    "embedding": r"/embedding/",
    "lookahead": r"/lookahead/",
}
_LAYER = re.compile(r"[a-z_]+/((\w+)/\d+)/")


def groups_of(name: str) -> tuple[str, ...]:
    """Returns the groups of one array: its part, and its stack and layer if it has one.

    Args:
        name: Name of a layer's array, as in ``moe_jax.models.places``.

    Examples:
        >>> from moe_jax.models.groups import groups_of
        >>> groups_of("params/layers/0/feed_forward/experts/up")
        ('experts', 'layers', 'layers/0', 'layers/0/experts')
    """
    part = next(part for part, pattern in _PARTS.items() if re.search(pattern, name))
    layer = _LAYER.match(name)
    return (part, layer[2], layer[1], f"{layer[1]}/{part}") if layer else (part,)


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


def _listed(group: str, known: Iterable[str]) -> str:
    """Returns the end of a message about an unknown group, with the known ones."""
    plain = [name for name in known if "/" not in name]
    layers = sorted(name.split("/") for name in known if name.count("/") == 1)
    last: dict[str, int] = {}
    for stack, index in layers:
        last[stack] = max(last.get(stack, 0), int(index))
    listed = ", ".join(f"{stack}/0 to {stack}/{index}" for stack, index in last.items())
    return f"{nearest(group, plain)}, {listed}, and parts of layers such as {layers[0][0]}/0/norms"
