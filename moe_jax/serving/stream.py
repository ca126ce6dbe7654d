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
    layer_distances,
    token_distance,
)
from moe_jax.analysis.drift_kinds import chance_distance_of_tokens, drifted, with_kinds
from moe_jax.analysis.observed import Observed, ObservedLayer
from moe_jax.models.config import SparseLayer
from moe_jax.monitor import Alarm, Drift, on_stream
from moe_jax.monitor.alarms import Line
from moe_jax.monitor.watch import names_of
from moe_jax.training.metrics import load_statistics

# Conditions in words, by alarm and layer.
Conditions: TypeAlias = dict[str, dict[str, str]]


@dataclasses.dataclass(frozen=True)
class TrafficRules:
    """Alarms on a served stream.

    Attributes:
        alarms: The rules.
        references: Line with the loads to compare with, for each reference of a ``Drift``; ``None``
            takes the first window of the stream.
        window: Number of tokens after which the stream is judged.
        say: Function that receives each new condition in words.
    """

    alarms: Sequence[Alarm]
    references: Mapping[str, Line | None]
    window: int = 8192
    say: Callable[[str], None] = print


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
            # The analysis leaves choices of an expert from ``E`` on out.
            experts = np.where(choices < 0, layer.moe.num_experts, choices.astype(np.int64))
            gates = np.ones(experts.shape)
            own.append(ObservedLayer(str(layer.name), layer.moe.num_experts, experts, gates))
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
        drift: Distances of the last window from the first one, as ``moe_jax.analysis.drift`` names
            them, and ``drifted``: ``none``, ``data``, ``routing`` or ``data and routing``; ``None``
            before the second window, or without a ``Drift``.
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
class _First:
    """The first window of a stream, with which later ones are compared.

    Attributes:
        line: Its loads.
        tokens: Its token ids ``(N,)``.
        tokens_by_chance: Distance of the token ids of its requests of even and of odd number.
        tables: Choices by token id, for each MoE layer.
        by_chance: Distance of the experts of the same token ids in these requests, for each layer.
    """

    line: Line
    tokens: np.ndarray
    tokens_by_chance: float
    tables: list[TokenTable]
    by_chance: list[float | None]

    @classmethod
    def of(cls, line: Line, window: Observed, tables: list[TokenTable]) -> _First:
        chance = chance_distance_of_tokens(window.tokens, window.documents)
        by_chance = [chance_distance(window, layer) for layer in window.layers]
        return cls(line, window.tokens, chance, tables, by_chance)


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
        self._first: _First | None = None
        self._names = names_of(rules.alarms)
        self.state = StreamState(tuple(self._names))

    def see(self, served: ServedWindow) -> StreamState:
        """Returns the alarms after the next window, and reports each new condition."""
        window = served.observed(self._layers)
        tokens = self.state.tokens + len(window.tokens)
        tables = [by_token(layer, window.tokens) for layer in window.layers]
        line = _line(tokens, window, self._layers)
        drift = None
        if self._first is None:
            first = {**line, "about": "the first window"}
            self._first = _First.of(first, window, tables)
        elif any(isinstance(alarm, Drift) for alarm in self._rules.alarms):
            drift = _distances(self._first, window, tables)
        alarms = self._conditions(line, drift)
        for words in _new(self.state.alarms, alarms):
            self._rules.say(words)
        self.state = StreamState(
            self.state.names, tokens, alarms, None if drift is None else self._named(drift)
        )
        return self.state

    def _conditions(self, line: Line, drift: dict[str, Any] | None) -> Conditions:
        """Returns the active conditions; those of a drift have its kind."""
        rules = self._rules
        assert self._first is not None
        known = {name: found or self._first.line for name, found in rules.references.items()}
        found = on_stream(rules.alarms, line, {"": self._first.line, **known})
        for alarm, name in zip(rules.alarms, self._names, strict=True):
            if isinstance(alarm, Drift):
                moved = found.get(name, {})
                found[name] = with_kinds(moved, drift, alarm.above, "the first window")
        return {name: layers for name, layers in found.items() if layers}

    def _named(self, drift: dict[str, Any]) -> dict[str, Any]:
        """Returns the distances with the kind of the drift, by the lowest limit of the rules."""
        limit = min(alarm.above for alarm in self._rules.alarms if isinstance(alarm, Drift))
        return {**drift, "drifted": drifted(drift, limit)}


def _line(step: int, window: Observed, layers: Sequence[SparseLayer]) -> dict[str, Any]:
    """Returns the loads of a window as a line of the log; a served token is never dropped."""
    found = []
    for sparse, layer in zip(layers, window.layers, strict=True):
        load = np.bincount(layer.choices.reshape(-1), minlength=layer.num_experts)
        load = load[: layer.num_experts]
        shares = (load / max(load.sum(), 1)).tolist()
        own = {"layer": sparse.name, "dropped_fraction": 0.0, "load": shares}
        found.append({**own, **load_statistics(load)})
    return {"kind": "serve", "step": step, "layers": found}


def _distances(first: _First, window: Observed, tables: list[TokenTable]) -> dict[str, Any]:
    """Returns the distances of a window from the first one."""
    parts = zip(window.layers, first.tables, tables, first.by_chance, strict=True)
    return {
        "tokens": token_distance(first.tokens, window.tokens),
        "tokens_by_chance": first.tokens_by_chance,
        "layers": [
            {"layer": layer.name, **layer_distances(before, after), "by_chance": chance}
            for layer, before, after, chance in parts
        ],
    }


def _new(before: Conditions, after: Conditions) -> list[str]:
    """Returns the conditions in words that were not active before."""
    return [
        f"{name} in layer {layer}: {words}"
        for name, layers in after.items()
        for layer, words in layers.items()
        if layer not in before.get(name, {})
    ]
