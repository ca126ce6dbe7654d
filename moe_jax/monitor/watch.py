"""Applies alarms to the lines of a log in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_jax.monitor.alarms import Alarm, Drift, Line

# Field of a line: by alarm and layer, the condition in words.
ALARMS = "alarms"


@dataclasses.dataclass(frozen=True)
class Seen:
    """A line of the log with its alarms.

    Attributes:
        line: The line; with alarms it has the further fields ``alarms``, the conditions by alarm
            and layer, and ``active_alarms``, their number.
        new: Conditions in words that the line before it did not have.
        stops: True if one of the new conditions stops the run.
    """

    line: dict[str, Any]
    new: tuple[str, ...] = ()
    stops: bool = False


def names_of(alarms: Sequence[Alarm]) -> list[str]:
    """Returns the class of each alarm; a further alarm of a class has its index in addition."""
    names = [type(alarm).__name__ for alarm in alarms]
    return [n if names.index(n) == i else f"{n}.{i}" for i, n in enumerate(names)]


def on_stream(
    alarms: Sequence[Alarm], line: Line, references: Mapping[str, Line | None]
) -> dict[str, dict[str, str]]:
    """Returns the conditions in words on an evaluated stream, by alarm and layer.

    Args:
        alarms: The rules, of training and of validation.
        line: Evaluation of the stream.
        references: Line to compare with, for each reference of a ``Drift``.
    """
    found = {}
    for alarm, name in zip(alarms, names_of(alarms), strict=True):
        reference = references[alarm.reference] if isinstance(alarm, Drift) else None
        if layers := alarm.on_stream(line, reference):
            found[name] = layers
    return found


def in_words(means: Mapping[str, Any]) -> list[str]:
    """Returns one line for each condition of an evaluation."""
    return [
        f"{name} in layer {layer}: {words}"
        for name, layers in means.get(ALARMS, {}).items()
        for layer, words in layers.items()
    ]


class Watch:
    """Alarms of a run, with those lines of its log that they read."""

    def __init__(
        self,
        alarms: Sequence[Alarm],
        earlier: Iterable[Line] = (),
        references: Mapping[str, Line] | None = None,
    ):
        """Starts after the earlier lines of the log.

        Args:
            alarms: The rules.
            earlier: Earlier lines of the run, in order of their steps.
            references: Line to compare with, for each reference of a ``Drift``.
        """
        self._alarms = alarms
        self._references = dict(references or {})
        self._first: dict[str, Line] = {}
        self._lines: dict[str, list[Line]] = {}
        for line in earlier:
            self._keep(line)

    def see(self, line: Mapping[str, Any]) -> Seen:
        """Returns a new line with its alarms."""
        if not self._alarms:
            return Seen(dict(line))
        last = self._lines.get(line["kind"], [])[-1:]
        before = last[0].get(ALARMS, {}) if last else {}
        self._keep(line)
        found = self._found(line)
        marked = {
            **line,
            ALARMS: {name: layers for _, name, layers in found},
            "active_alarms": sum(len(layers) for _, _, layers in found),
        }
        self._lines[line["kind"]][-1] = marked
        new = [
            (alarm, f"{name} in layer {layer}: {words}")
            for alarm, name, layers in found
            for layer, words in layers.items()
            if layer not in before.get(name, {})
        ]
        return Seen(marked, tuple(text for _, text in new), any(alarm.stop for alarm, _ in new))

    def _found(self, line: Line) -> list[tuple[Alarm, str, dict[str, str]]]:
        """Returns each alarm with a condition, its name and its layers."""
        found = []
        for index, alarm in enumerate(self._alarms):
            if alarm.kind == line["kind"]:
                layers = alarm.found(self._lines[line["kind"]], self._reference(alarm))
                if layers:
                    found.append((alarm, names_of(self._alarms)[index], layers))
        return found

    def _reference(self, alarm: Alarm) -> Line | None:
        if not isinstance(alarm, Drift):
            return None
        if alarm.reference:
            return self._references[alarm.reference]
        return self._first[alarm.kind]

    def _keep(self, line: Line) -> None:
        """Adds a line, and drops the lines before the longest window."""
        kind = line["kind"]
        self._first.setdefault(kind, line)
        window = max((alarm.window for alarm in self._alarms if alarm.kind == kind), default=0)
        kept = [*self._lines.get(kind, []), line]
        # One line before the window shows that the log covers the window.
        start = line["step"] - window
        covered = [i for i, one in enumerate(kept) if one["step"] <= start]
        self._lines[kind] = kept[covered[-1] :] if covered else kept
