"""Published series and laws for the figure of an ablation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class FittedCoefficient:
    """A coefficient of a published law that the losses of the arms give too.

    Attributes:
        name: The coefficient in words.
        source: Paper and table of the published value.
        published: The published value.
        fit: Function that returns the coefficient for axis values and losses of one seed.
    """

    name: str
    source: str
    published: float
    fit: Callable[[Sequence[float], Sequence[float]], float]


@dataclasses.dataclass(frozen=True)
class Overlay:
    """An axis for the loss of the arms, with published losses over the same axis.

    Losses on different corpora are not comparable, so every loss is shown as a difference to the
    first arm.

    Attributes:
        label: Label of the axis, which is logarithmic.
        places: Value of each arm on the axis, the first arm first.
        series: Published losses by name, and by value on the axis.
        laws: Published laws by name; a law maps a value on the axis to a loss.
        coefficients: Coefficients of laws, fitted to the losses of each seed.
    """

    label: str
    places: Mapping[str, float]
    series: Mapping[str, Mapping[float, float]] = dataclasses.field(default_factory=dict)
    laws: Mapping[str, Callable[[float], float]] = dataclasses.field(default_factory=dict)
    coefficients: Sequence[FittedCoefficient] = ()

    @property
    def first(self) -> str:
        """Arm that other arms are compared with."""
        return next(iter(self.places))

    def expected(self, place: float) -> dict[str, float | None]:
        """Returns the difference of each series and law to the first arm, at an axis value."""
        start = self.places[self.first]
        differences: dict[str, float | None] = {}
        for name, values in self.series.items():
            known = {start, place} <= values.keys()
            differences[name] = values[place] - values[start] if known else None
        laws = {name: law(place) - law(start) for name, law in self.laws.items()}
        return differences | laws
