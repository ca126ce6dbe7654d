"""Statistics of a corpus in the experts of a model: load, specialisation, quality by group."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_jax.analysis.gaps import gap_of_ratio
from moe_jax.analysis.observed import Observed, ObservedLayer, among
from moe_jax.analysis.tokens import mutual_information, purity
from moe_jax.training.metrics import load_statistics, shares

_HOT = 2.0
_POSITIONS = 8


def load_of(layer: ObservedLayer) -> dict[str, Any]:
    """Returns ``load (E,)`` as shares of all choices, its entropy, and dead and hot experts.

    The ``entropy`` is a share of ``log E``, the entropy of an even load. A ``dead`` expert has no
    choice, and a ``hot`` expert has more than twice an even share. ``dropped`` is the share of
    dropped choices, and ``unrouted`` the share of tokens that no expert takes.
    """
    experts = layer.num_experts
    wanted = layer.wanted[layer.wanted < experts]
    load = np.bincount(wanted, minlength=experts) / max(wanted.size, 1)
    seen = load[load > 0]
    entropy = float(-(seen * np.log(seen)).sum() / math.log(experts)) if experts > 1 else 1.0
    return {
        "load": load.tolist(),
        "entropy": entropy,
        "dead": np.flatnonzero(load == 0).tolist(),
        "hot": np.flatnonzero(load > _HOT / experts).tolist(),
        "dropped": float(layer.dropped.sum() / max(wanted.size, 1)),
        "unrouted": float(layer.unrouted.mean()),
    }


def logged(layer: ObservedLayer) -> dict[str, Any]:
    """Returns the numbers of a layer that the log of a run has and alarms read."""
    wanted = layer.wanted[layer.wanted < layer.num_experts]
    taken = layer.choices[(layer.choices >= 0) & (layer.choices < layer.num_experts)]
    demand, load = (np.bincount(x, minlength=layer.num_experts) for x in (wanted, taken))
    return {
        "load": shares(load),
        "demand": shares(demand),
        "dropped_fraction": float(layer.dropped.sum() / max(wanted.size, 1)),
        **load_statistics(demand),
    }


def counts_by(layer: ObservedLayer, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns counts ``(E, D)`` of choices by expert and value, and the ``D`` values.

    Args:
        layer: Choices ``(N, K)``.
        values: Integer ``(N,)`` of each token, such as its label.
    """
    known, index = np.unique(values, return_inverse=True)
    counts = np.zeros((layer.num_experts, len(known)), np.int64)
    token, choice = np.nonzero(layer.wanted < layer.num_experts)
    np.add.at(counts, (layer.wanted[token, choice], index[token]), 1)
    return counts, known


def together(layer: ObservedLayer) -> np.ndarray:
    """Returns the share ``(E, E)`` of the tokens of the first expert that chose the second too."""
    taken = np.zeros((len(layer.wanted), layer.num_experts + 1), np.float32)
    np.put_along_axis(taken, np.minimum(layer.wanted, layer.num_experts), 1, axis=1)
    both = taken[:, :-1].T @ taken[:, :-1]
    return both / np.maximum(np.diagonal(both)[:, None], 1)


def agreement(layer: ObservedLayer, other: ObservedLayer) -> float:
    """Returns the share of choices that another model also makes for the token.

    Against the final checkpoint this is router saturation (OLMoE, 2409.02060, section 5.1).
    """
    same = among(layer.wanted, np.where(other.chosen, other.wanted, -1))[layer.chosen]
    return float(same.mean()) if same.size else 1.0


def predicted(layer: ObservedLayer, after: ObservedLayer, documents: np.ndarray) -> dict[str, Any]:
    """Returns how well the first choice of a layer predicts the first choice of the next layer.

    The most frequent next expert of each expert is counted on the documents of even number, and
    ``accuracy`` is measured on the others. ``chance`` is the accuracy of the most frequent expert.
    Tokens without an expert in one of the layers are left out. Both are ``None`` with a single
    document.
    """
    first, then = layer.wanted[:, 0], after.wanted[:, 0]
    both = layer.chosen[:, 0] & after.chosen[:, 0]
    fit, test = both & (documents % 2 == 0), both & (documents % 2 == 1)
    if not (fit.any() and test.any()):
        return {"accuracy": None, "chance": None}
    counts = np.zeros((first.max() + 1, then.max() + 1), np.int64)
    np.add.at(counts, (first[fit], then[fit]), 1)
    return {
        "accuracy": float((counts.argmax(1)[first[test]] == then[test]).mean()),
        "chance": float((counts.sum(0).argmax() == then[test]).mean()),
    }


def layers_of(observed: Observed, labels: np.ndarray | None) -> list[dict[str, Any]]:
    """Returns the statistics of every layer.

    Args:
        observed: Tokens and choices.
        labels: Label ``(documents,)`` of each document; ``None`` for an unlabelled corpus.
    """
    longest = observed.positions.max() + 1
    values = {"token": observed.tokens, "position": observed.positions * _POSITIONS // longest}
    if labels is not None:
        values["label"] = labels[observed.documents]
    found = []
    for index, layer in enumerate(observed.layers):
        counts = {name: counts_by(layer, value)[0] for name, value in values.items()}
        after = observed.layers[index + 1 : index + 2]
        found.append(
            {
                "layer": layer.name,
                **load_of(layer),
                "information": {name: mutual_information(c) for name, c in counts.items()},
                "purity": {name: purity(c) for name, c in counts.items()},
                "by_label": counts["label"].tolist() if labels is not None else None,
                "together": together(layer).tolist(),
                "predicts_next": predicted(layer, after[0], observed.documents) if after else None,
            }
        )
    return found


def quality(
    observed: Sequence[Observed], labels: np.ndarray, names: Sequence[str], sizes: np.ndarray
) -> list[dict[str, Any]]:
    """Returns loss, bits per byte, dropped choices and unrouted tokens of every group.

    Loss and bits per byte are ``None`` if the model gives no token a likelihood.

    Args:
        observed: Tokens, choices and losses of each stack.
        labels: Group ``(documents,)`` of each document.
        names: Name of each group.
        sizes: UTF-8 bytes ``(documents,)`` of the text that was read of each document.
    """
    nats, known = _by_document(observed, len(labels))
    lost, wanted = _drops_by_document(observed, len(labels))
    unrouted = _unrouted_by_document(observed, len(labels))
    group_of_token = np.concatenate([labels[one.documents] for one in observed])

    def mean(over: np.ndarray, under: np.ndarray) -> float | None:
        return float(over.sum() / max(under.sum(), 1)) if known.any() else None

    found = []
    for group, name in enumerate(names):
        own, here = labels == group, group_of_token == group
        found.append(
            {
                "name": name,
                "documents": int(own.sum()),
                "tokens": int(here.sum()),
                "loss": mean(nats[own], known[own]),
                "bits_per_byte": mean(nats[own] / math.log(2), sizes[own]),
                "dropped": float(lost[own].sum() / max(wanted[own].sum(), 1)),
                "unrouted": float(unrouted[0][own].sum() / max(unrouted[1][own].sum(), 1)),
            }
        )
    return found


def gap(
    observed: Sequence[Observed], labels: np.ndarray, names: Sequence[str], sizes: np.ndarray
) -> dict[str, Any] | None:
    """Returns the gaps between the worst and the best group: bits per byte, drops, unrouted tokens.

    Args:
        observed: Tokens, choices and losses of each stack.
        labels: Group ``(documents,)`` of each document.
        names: Name of each group; with one group there is no gap.
        sizes: UTF-8 bytes ``(documents,)`` of each document.

    Returns:
        The groups ``worst`` and ``best``, their gap ``bits_per_byte`` and its ``interval``, and
        under ``drops`` the same for the share ``dropped`` of the choices, and under ``unrouted``
        for the share of tokens that no expert takes; see ``gap_of_ratio``. A model that gives no
        token a likelihood has ``drops`` and ``unrouted`` alone.
    """
    if len(names) < 2:
        return None
    nats, known = _by_document(observed, len(labels))
    bits, drops = nats / math.log(2), _drops_by_document(observed, len(labels))
    unrouted = _unrouted_by_document(observed, len(labels))
    quality = gap_of_ratio(bits, sizes, labels, names, "bits_per_byte") if known.any() else {}
    return {
        **quality,
        "drops": gap_of_ratio(*drops, labels, names, "dropped"),
        "unrouted": gap_of_ratio(*unrouted, labels, names, "unrouted"),
    }


def _drops_by_document(
    observed: Sequence[Observed], documents: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of dropped choices and of all choices of each document, over layers."""
    sums = np.zeros((2, documents), np.int64)
    layers = [(one.documents, layer) for one in observed for layer in one.layers]
    for own, layer in layers:
        marks = layer.dropped, layer.wanted < layer.num_experts
        sums += [np.bincount(own, mark.sum(1), documents).astype(int) for mark in marks]
    return sums[0], sums[1]


def _unrouted_by_document(
    observed: Sequence[Observed], documents: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of unrouted tokens and of all tokens of each document, over layers."""
    layers = [(one.documents, layer.unrouted) for one in observed for layer in one.layers]
    pairs = [
        (np.bincount(own, mark, documents), np.bincount(own, minlength=documents))
        for own, mark in layers
    ]
    unrouted, tokens = (sum(counts) for counts in zip(*pairs, strict=True))
    return np.asarray(unrouted), np.asarray(tokens)


def _by_document(observed: Sequence[Observed], documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sum of the losses and the number of losses of each document."""
    losses = np.concatenate([one.losses for one in observed]).astype(np.float64)
    known = ~np.isnan(losses)
    index = np.concatenate([one.documents for one in observed])[known]
    sums = np.bincount(index, losses[known], documents)
    return sums, np.bincount(index, minlength=documents)


def passages(
    observed: Observed, layer: ObservedLayer, expert: int, piece: Callable[[int], str], *, most: int
) -> dict[str, Any]:
    """Returns the most frequent tokens of an expert, and the text around its largest gates."""
    token, choice = np.nonzero(layer.choices == expert)
    ids, counts = np.unique(observed.tokens[token], return_counts=True)
    top = np.argsort(-counts, kind="stable")[:most]
    strongest = token[np.argsort(-layer.gates[token, choice], kind="stable")[: most // 3]]
    return {
        "expert": expert,
        "tokens": [{"piece": piece(int(ids[i])), "count": int(counts[i])} for i in top],
        "passages": [_around(observed, int(index), piece) for index in strongest],
    }


def _around(observed: Observed, index: int, piece: Callable[[int], str]) -> list[str]:
    """Returns the text before a token, the token, and the text after it, of one document."""
    same = observed.documents == observed.documents[index]
    before, after = slice(max(index - 8, 0), index), slice(index + 1, index + 5)
    texts = ("".join(piece(int(t)) for t in observed.tokens[s][same[s]]) for s in (before, after))
    left, right = texts
    return [left, piece(int(observed.tokens[index])), right]
