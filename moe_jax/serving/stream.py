"""Judges the windows of a served stream: its alarms, and drift of its data or of its routing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int, Int16

from moe_jax.analysis.drift import (
    TokenTable,
    by_token,
    chance_distance,
    chance_distance_of_tokens,
    drifted,
    layer_distances,
    token_distance,
)
from moe_jax.analysis.drift_kinds import with_kinds
from moe_jax.analysis.observed import Observed, ObservedLayer
from moe_jax.models.config import SparseLayer
from moe_jax.monitor import Alarm, Drift, on_stream
from moe_jax.monitor.alarms import Line
from moe_jax.monitor.watch import names_of
from moe_jax.training.metrics import load_statistics, shares

# Conditions in words, by alarm and layer.
Conditions: TypeAlias = dict[str, dict[str, str]]


@dataclasses.dataclass(frozen=True)
class TrafficRules:
    """Alarms on a served stream.

    Attributes:
        alarms: The rules.
        references: Line with the loads to compare with, for each reference of a ``Drift``; ``None``
            takes the first window of the stream.
        streams: Tokens and choices to compare with, for references that have some; the kind of a
            drift from any other reference is the kind of the change since the first window.
        window: Number of tokens after which the stream is judged.
        say: Function that receives each new condition in words.
    """

    alarms: Sequence[Alarm]
    references: Mapping[str, Line | None]
    window: int = 8192
    say: Callable[[str], None] = print
    streams: Mapping[str, Observed] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ServedWindow:
    """``N`` tokens that an engine has read, in order.

    Attributes:
        tokens: Token ids ``(N,)``.
        requests: Number ``(N,)`` of the request.
        choices: Expert ``(layers, N, K)`` of each choice, negative for none.
    """

    tokens: Int[np.ndarray, " N"]
    requests: Int[np.ndarray, " N"]
    choices: Int16[np.ndarray, "layers N K"]

    def observed(self, layers: Sequence[SparseLayer]) -> Observed:
        """Returns the tokens as the analysis reads them; a request is a document."""
        own = []
        for layer, choices in zip(layers, self.choices, strict=True):
            # The analysis leaves choices of an expert from ``E`` on out, as those of free experts.
            experts = np.where(choices < 0, layer.moe.num_experts, choices.astype(np.int64))
            gates, name = np.ones(experts.shape), str(layer.name)
            own.append(ObservedLayer(name, layer.moe.num_experts, experts, gates, free=1))
        unknown = np.full(len(self.tokens), np.nan)
        places = np.zeros(len(self.tokens), np.int64)
        return Observed(self.tokens, places, self.requests, unknown, tuple(own))


@dataclasses.dataclass(frozen=True)
class StreamState:
    """The alarms of a served stream.

    Attributes:
        names: Names of all alarms.
        tokens: Number of tokens that have been judged.
        alarms: Active conditions in words, by alarm and layer.
        drift: Distances of the last window from the stream that the first ``Drift`` compares with,
            as ``moe_jax.analysis.drift`` names them, and ``drifted``: ``none``, ``data``,
            ``routing`` or ``data and routing``; ``None`` without a ``Drift``, or without another
            stream, as in the first window.
    """

    names: tuple[str, ...] = ()
    tokens: int = 0
    alarms: Conditions = dataclasses.field(default_factory=dict)
    drift: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """Returns the state as a JSON object."""
        active = sum(map(len, self.alarms.values()))
        return {
            "judged_tokens": self.tokens,
            "active_alarms": active,
            "alarms": self.alarms,
            "drift": self.drift,
        }


@dataclasses.dataclass(frozen=True)
class _Origin:
    """A stream with which windows are compared.

    Attributes:
        words: The stream in words.
        tokens: Its token ids ``(N,)``.
        tokens_by_chance: Distance of the token ids of its two halves; see
            ``moe_jax.analysis.drift.halves``.
        tables: Choices by token id, for each MoE layer.
        by_chance: Distance of the experts of the same token ids in these halves, for each layer.
    """

    words: str
    tokens: np.ndarray
    tokens_by_chance: float
    tables: list[TokenTable]
    by_chance: list[float | None]

    @classmethod
    def of(cls, words: str, stream: Observed) -> _Origin:
        chance = chance_distance_of_tokens(stream.tokens, stream.documents)
        by_chance = [chance_distance(stream, layer) for layer in stream.layers]
        tables = [by_token(layer, stream.tokens) for layer in stream.layers]
        return cls(words, stream.tokens, chance, tables, by_chance)

    def distances(self, window: Observed) -> dict[str, Any]:
        """Returns the distances of a window from the stream."""
        parts = zip(window.layers, self.tables, self.by_chance, strict=True)
        return {
            "tokens": token_distance(self.tokens, window.tokens),
            "tokens_by_chance": self.tokens_by_chance,
            "layers": [
                {
                    "layer": layer.name,
                    **layer_distances(before, by_token(layer, window.tokens)),
                    "by_chance": chance,
                }
                for layer, before, chance in parts
            ],
        }


class StreamJudge:
    """Applies alarms to the windows of a stream, in order.

    Attributes:
        state: Active alarms after the last window.
    """

    def __init__(self, rules: TrafficRules, layers: Sequence[SparseLayer]):
        """Starts before the first window.

        Args:
            rules: Alarms.
            layers: The MoE layers in the order of the choices.
        """
        self._rules, self._layers = rules, layers
        self._first: tuple[Line, _Origin] | None = None
        self._names = names_of(rules.alarms)
        self._drifts = [alarm for alarm in rules.alarms if isinstance(alarm, Drift)]
        self._origins = {
            name: _Origin.of(f"the validation documents of {name or 'the run'}", stream)
            for name, stream in rules.streams.items()
        }
        self.state = StreamState(tuple(self._names))

    def see(self, served: ServedWindow) -> StreamState:
        """Returns the alarms after the next window, and reports each new condition."""
        window = served.observed(self._layers)
        tokens = self.state.tokens + len(window.tokens)
        line = _line(tokens, window, self._layers)
        origins = self._compared()
        drifts = {name: one.distances(window) if one else None for name, one in origins.items()}
        if self._first is None:
            words = "the first window"
            self._first = {**line, "about": words}, _Origin.of(words, window)
        alarms = self._conditions(line, self._first[0], origins, drifts)
        for words in _new(self.state.alarms, alarms):
            self._rules.say(words)
        self.state = StreamState(self.state.names, tokens, alarms, self._named(drifts))
        return self.state

    def _compared(self) -> dict[str, _Origin | None]:
        """Returns the stream that each reference compares with; ``None`` if there is none yet."""
        first = None if self._first is None else self._first[1]
        return {one.reference: self._origins.get(one.reference, first) for one in self._drifts}

    def _conditions(
        self,
        line: Line,
        first: Line,
        origins: Mapping[str, _Origin | None],
        drifts: Mapping[str, dict[str, Any] | None],
    ) -> Conditions:
        """Returns the active conditions; those of a drift have its kind."""
        rules = self._rules
        known = {name: found or first for name, found in rules.references.items()}
        found = on_stream(rules.alarms, line, {"": first, **known})
        for alarm, name in zip(rules.alarms, self._names, strict=True):
            if isinstance(alarm, Drift):
                origin, moved = origins[alarm.reference], found.get(name, {})
                words = origin.words if origin else ""
                found[name] = with_kinds(moved, drifts[alarm.reference], alarm.above, words)
        return {name: layers for name, layers in found.items() if layers}

    def _named(self, drifts: Mapping[str, dict[str, Any] | None]) -> dict[str, Any] | None:
        """Returns the distances of the first rule with the kind, by the lowest limit of all."""
        found = next(iter(drifts.values()), None)
        if found is None:
            return None
        return {**found, "drifted": drifted(found, min(alarm.above for alarm in self._drifts))}


def _line(step: int, window: Observed, layers: Sequence[SparseLayer]) -> dict[str, Any]:
    """Returns the loads of a window as a line of the log; a served token is never dropped."""
    found = []
    for sparse, layer in zip(layers, window.layers, strict=True):
        load = np.bincount(layer.choices.reshape(-1), minlength=layer.num_experts)
        load = load[: layer.num_experts]
        own: dict[str, Any] = {"layer": sparse.name, "dropped_fraction": 0.0}
        own |= {"load": shares(load), "demand": shares(load)}
        found.append({**own, **load_statistics(load)})
    return {"kind": "serve", "step": step, "layers": found}


def _new(before: Conditions, after: Conditions) -> list[str]:
    """Returns the conditions in words that were not active before."""
    return [
        f"{name} in layer {layer}: {words}"
        for name, layers in after.items()
        for layer, words in layers.items()
        if layer not in before.get(name, {})
    ]
