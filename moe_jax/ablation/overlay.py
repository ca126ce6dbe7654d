"""Published series and laws to draw an ablation with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Overlay:
    """What the loss of each arm is drawn against, and what was published over the same axis.

    Losses of other corpora do not compare, so all is shown as a difference to the first arm.

    Attributes:
        label: of the axis, which is logarithmic.
        places: where each arm stands on it, the first arm first.
        series: published losses by place on the axis, by name.
        laws: published laws, from a place on the axis to a loss, by name.
    """

    label: str
    places: Mapping[str, float]
    series: Mapping[str, Mapping[float, float]] = dataclasses.field(default_factory=dict)
    laws: Mapping[str, Callable[[float], float]] = dataclasses.field(default_factory=dict)

    @property
    def first(self) -> str:
        """The arm that others are compared with."""
        return next(iter(self.places))

    def expected(self, place: float) -> dict[str, float | None]:
        """Returns the difference to the first arm that each series and each law has at a place."""
        start = self.places[self.first]
        found: dict[str, float | None] = {}
        for name, values in self.series.items():
            known = {start, place} <= values.keys()
            found[name] = values[place] - values[start] if known else None
        return found | {name: law(place) - law(start) for name, law in self.laws.items()}
