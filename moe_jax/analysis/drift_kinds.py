"""Conditions of a rule of drift with their kinds: drift of the data, or drift of the routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.analysis.drift import Distances, data_moved, drift, routing_moved
from moe_jax.analysis.observed import Observed

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
    if data_moved(found, limit):
        data = ["data"]
        where = far.format(found["tokens"], max(limit, found["tokens_by_chance"]))
        conditions[ALL] = f"the token ids are {where}: drift of the data"
    for layer in found["layers"]:
        name, words = layer["layer"], []
        kinds = [*data, *["routing"] * routing_moved(layer, limit)]
        if name in loads:
            kind = " and ".join(f"of the {kind}" for kind in kinds)
            words.append(f"{loads[name]}: {'drift ' + kind if kind else 'of unknown kind'}")
        if "routing" in kinds:
            where = far.format(layer["same_tokens"], max(limit, layer["by_chance"] or 0.0))
            words.append(f"the experts of the same token ids are {where}: drift of the routing")
        if words:
            conditions[name] = "; ".join(words)
    return conditions
