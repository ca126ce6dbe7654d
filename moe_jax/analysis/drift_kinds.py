"""Conditions of a rule of drift with their kinds: drift of the data, or drift of the routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from moe_jax.analysis.drift import drift
from moe_jax.analysis.observed import Observed

# Distances between two streams: ``tokens``, ``tokens_by_chance``, and ``layers`` with the fields
# ``layer``, ``load``, ``same_tokens`` and ``by_chance``; see ``moe_jax.analysis.drift``.
Distances: TypeAlias = Mapping[str, Any]
# Layer of a condition that holds for the whole stream.
ALL = "all"


def distances(before: Sequence[Observed], after: Sequence[Observed]) -> dict[str, Any]:
    """Returns the distances of two streams, with the names that a model gives to its layers.

    Args:
        before: Stream to compare with, in each stack of layers.
        after: Stream of a model with the same layers and experts.
    """
    found = drift(before, after)
    named = [{**one, "layer": one["layer"].removeprefix("layer ")} for one in found["layers"]]
    kept = {name: found[name] for name in ("tokens", "tokens_by_chance")}
    return {**kept, "layers": named}


def drifted(found: Distances, limit: float) -> str:
    """Returns ``none``, ``data``, ``routing`` or ``data and routing``."""
    moved = any(_routing_moved(layer, limit) for layer in found["layers"])
    kinds = (("data", _data_moved(found, limit)), ("routing", moved))
    return " and ".join(name for name, so in kinds if so) or "none"


def with_kinds(
    loads: Mapping[str, str], found: Distances | None, limit: float, origin: str
) -> dict[str, str]:
    """Returns the conditions of a rule of drift with their kinds, by layer.

    Args:
        loads: Layers whose load has moved, in words.
        found: Distances from the other stream; ``None`` without one.
        limit: Largest allowed distance.
        origin: The other stream in words.
    """
    if found is None:
        return {layer: f"{words}: of unknown kind" for layer, words in loads.items()}
    far, data = f"at a distance of {{:.3f}} from {origin}, above {{:g}}", []
    conditions = {}
    if _data_moved(found, limit):
        data = ["data"]
        where = far.format(found["tokens"], max(limit, found["tokens_by_chance"]))
        conditions[ALL] = f"the token ids are {where}: drift of the data"
    for layer in found["layers"]:
        name, words = layer["layer"], []
        kinds = [*data, *["routing"] * _routing_moved(layer, limit)]
        if name in loads:
            kind = " and ".join(f"of the {kind}" for kind in kinds)
            words.append(f"{loads[name]}: {'drift ' + kind if kind else 'of unknown kind'}")
        if "routing" in kinds:
            where = far.format(layer["same_tokens"], max(limit, layer["by_chance"] or 0.0))
            words.append(f"the experts of the same token ids are {where}: drift of the routing")
        if words:
            conditions[name] = "; ".join(words)
    return conditions


def _data_moved(found: Distances, limit: float) -> bool:
    return bool(found["tokens"] > max(limit, found["tokens_by_chance"]))


def _routing_moved(layer: Mapping[str, Any], limit: float) -> bool:
    """Returns whether the same token ids go to other experts of a layer, beyond chance."""
    return (layer["same_tokens"] or 0.0) > max(limit, layer["by_chance"] or 0.0)
