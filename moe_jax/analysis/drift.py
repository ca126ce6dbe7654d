"""Drift between two streams, split into a drift of the data and a drift of the routing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from moe_jax.analysis.observed import Observed, ObservedLayer
from moe_jax.monitor.alarms import load_distance

# Number ``(E,)`` of choices of each expert, by token id.
TokenTable: TypeAlias = dict[int, np.ndarray]
# Distances between two streams: ``tokens``, ``tokens_by_chance``, and ``layers`` with the fields
# ``layer``, ``load``, ``same_tokens`` and ``by_chance``; see ``drift``.
Distances: TypeAlias = Mapping[str, Any]
# A distance above this limit counts as a drift.
_LIMIT = 0.2


def drift(before: Sequence[Observed], after: Sequence[Observed]) -> dict[str, Any]:
    """Compares the tokens and the routing of two streams by Jensen-Shannon distances in base 2.

    A load can drift because the tokens differ, or because a router sends the same tokens to other
    experts. The distance ``same_tokens`` compares the experts of each token id alone, so that it is
    0 if only the frequencies of the tokens differ. Few tokens per id raise both distances by
    chance; ``tokens_by_chance`` and ``by_chance`` are the same distances between two halves of the
    first stream (``halves``).

    Args:
        before: Stream to compare with, in each stack of layers.
        after: Stream of a model with the same layers and experts.

    Returns:
        ``tokens``, the distance of the frequencies of the token ids, and ``tokens_by_chance``;
        ``layers``, with the distances ``load``, ``same_tokens`` and ``by_chance``; ``drifted``,
        which is ``none``, ``data``, ``routing`` or ``data and routing``; and ``words``, the same in
        one line.
    """
    first, second, documents = (
        np.concatenate([getattr(one, field) for one in stream])
        for stream, field in ((before, "tokens"), (after, "tokens"), (before, "documents"))
    )
    tokens, chance = token_distance(first, second), chance_distance_of_tokens(first, documents)
    pairs = zip(before, after, strict=True)
    layers = [layer for one, other in pairs for layer in _by_layer(one, other)]
    found = {"tokens": tokens, "tokens_by_chance": chance, "layers": layers}
    name = drifted(found, _LIMIT)
    return {**found, "drifted": name, "words": f"drift: {name} ({_in_words(found)})"}


def drifted(found: Distances, limit: float) -> str:
    """Returns ``none``, ``data``, ``routing`` or ``data and routing``."""
    moved = any(routing_moved(layer, limit) for layer in found["layers"])
    kinds = (("data", data_moved(found, limit)), ("routing", moved))
    return " and ".join(name for name, so in kinds if so) or "none"


def data_moved(found: Distances, limit: float) -> bool:
    """Returns whether the frequencies of the token ids differ, beyond chance."""
    return bool(found["tokens"] > max(limit, found["tokens_by_chance"]))


def routing_moved(layer: Mapping[str, Any], limit: float) -> bool:
    """Returns whether the same token ids go to other experts of a layer, beyond chance."""
    return (layer["same_tokens"] or 0.0) > max(limit, layer["by_chance"] or 0.0)


def _by_layer(before: Observed, after: Observed) -> Iterator[dict[str, Any]]:
    """Yields the distances of each layer of one stack."""
    for old, new in zip(before.layers, after.layers, strict=True):
        table, other = by_token(old, before.tokens), by_token(new, after.tokens)
        distances = layer_distances(table, other)
        yield {"layer": old.name, **distances, "by_chance": chance_distance(before, old)}


def layer_distances(before: TokenTable, after: TokenTable) -> dict[str, float | None]:
    """Returns the distances ``load`` and ``same_tokens`` of one layer; see ``drift``."""
    same = conditional_distance(before, after)
    return {"load": load_distance(_load(before), _load(after)), "same_tokens": same}


def chance_distance(stream: Observed, layer: ObservedLayer) -> float | None:
    """Returns ``same_tokens`` between the halves of one stream."""
    one = halves(stream.documents)
    half, rest = (by_token(layer, stream.tokens, where) for where in (one, ~one))
    return conditional_distance(half, rest)


def chance_distance_of_tokens(tokens: np.ndarray, documents: np.ndarray) -> float:
    """Returns the distance of the token ids between the halves of one stream.

    Args:
        tokens: Token ids ``(N,)``.
        documents: Number ``(N,)`` of the document.
    """
    one = halves(documents)
    return token_distance(tokens[one], tokens[~one])


def halves(documents: np.ndarray) -> np.ndarray:
    """Returns the mask ``(N,)`` of one half of a stream: the documents of even number.

    If all documents are of one kind, such as a single one, it is the first half of the tokens.

    Args:
        documents: Number ``(N,)`` of the document of each token.
    """
    even = documents % 2 == 0
    if even.all() or not even.any():
        return np.arange(len(documents)) < len(documents) // 2
    return even


def token_distance(before: np.ndarray, after: np.ndarray) -> float:
    """Returns the distance of the frequencies of token ids in two streams, from 0 to 1.

    Args:
        before: Token ids ``(N,)`` of one stream.
        after: Token ids ``(N,)`` of the other.
    """
    return load_distance(*_paired(before, after))


def by_token(
    layer: ObservedLayer, tokens: np.ndarray, where: np.ndarray | None = None
) -> TokenTable:
    """Returns the number ``(E,)`` of choices of each expert by token id, before capacity.

    Args:
        layer: Choices ``(N, K)``.
        tokens: Token ids ``(N,)``.
        where: Mask ``(N,)`` of the tokens to count; ``None`` counts all.
    """
    where = np.ones(len(tokens), bool) if where is None else where
    known, index = np.unique(tokens[where], return_inverse=True)
    wanted, experts = layer.wanted[where], layer.num_experts
    cells = (index[:, None] * experts + wanted)[wanted < experts]
    counts = np.bincount(cells, minlength=len(known) * experts).reshape(len(known), experts)
    return dict(zip(known.tolist(), counts, strict=True))


def conditional_distance(before: TokenTable, after: TokenTable) -> float | None:
    """Returns the distance of the experts of the same token ids, from 0 to 1.

    The distance is the root of the mean Jensen-Shannon divergence in base 2 over the token ids that
    both streams have, each weighted by the mean of its shares of the choices in the two streams.

    Args:
        before: Choices ``(E,)`` of each token id in one stream.
        after: Choices ``(E,)`` of each token id in the other.

    Returns:
        The distance; ``None`` if the streams share no token id.
    """
    shared = [t for t in before if t in after and before[t].any() and after[t].any()]
    if not shared:
        return None
    counts = np.array([[one[t] for t in shared] for one in (before, after)], np.float64)
    totals = counts.sum(-1)
    weights = (totals / totals.sum(1, keepdims=True)).mean(0)
    shares = counts / totals[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(shares > 0, shares * np.log2(shares / shares.mean(0)), 0.0)
    divergences = np.maximum(terms.sum((0, 2)) / 2, 0.0)
    return float(np.sqrt(weights @ divergences))


def _in_words(found: Distances) -> str:
    """Returns the distances of the tokens and of the layer whose experts differ most."""
    known = [one for one in found["layers"] if one["same_tokens"] is not None]
    moved = [one for one in known if routing_moved(one, _LIMIT)]
    worst = max(moved or known, key=lambda one: one["same_tokens"], default=None)
    same = "no token id is in both streams"
    if worst is not None:
        same = f"experts of the same tokens {worst['same_tokens']:.3f} in {worst['layer']}"
    tokens = f"{found['tokens']:.3f}, by chance {found['tokens_by_chance']:.3f}"
    return f"distance of the tokens {tokens}, {same}, limit {_LIMIT:g}"


def _paired(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Returns the number ``(2, V)`` of each token id in the two streams."""
    known, index = np.unique(np.concatenate([before, after]), return_inverse=True)
    parts = index[: len(before)], index[len(before) :]
    return np.array([np.bincount(part, minlength=len(known)) for part in parts])


def _load(table: TokenTable) -> list[float]:
    return np.sum(list(table.values()), axis=0).tolist()
