"""Which numbers a setting may hold: a range is declared in the setting's type and checked here.

A field of type ``Positive`` or ``Share`` is an ``int`` or a ``float`` with a ``Range`` beside it.
Fields of settings and choices of published routers use these types, and no range contains NaN or
infinity.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import typing
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np

from moe_jax.errors import ConfigError

# Arrays are indexed by int32 on every backend.
LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval of numbers.

    Attributes:
        low: its lower end.
        high: its upper end.
        above: the interval leaves ``low`` out.
        below: the interval leaves ``high`` out.
        also: numbers outside the interval that have a meaning of their own.
        instead: the setting to use in place of a number outside, for messages.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    also: tuple[float, ...] = ()
    instead: str = ""

    def __contains__(self, value: float) -> bool:
        if value in self.also:
            return True
        if not self.low <= value <= self.high:
            return False
        inside = _computed(value)
        return not (self.above and inside <= self.low or self.below and inside >= self.high)

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {_number(self.low)}"
        high = f"{'below' if self.below else 'at most'} {_number(self.high)}"
        also = "".join(f", or {_number(value)}" for value in self.also)
        return f"{low} and {high}{also}"

    def check(self, value: float, path: str) -> None:
        """Raises ``ConfigError`` if ``value``, the number of the setting ``path``, is outside."""
        if value not in self:
            finite = "" if _is_finite(value) else "finite, "
            instead = f"; {self.instead}" if self.instead else ""
            raise ConfigError(f"{path}={value!r} must be {finite}{self}{instead}")


Positive = Annotated[int, Range(1, LARGEST)]
Natural = Annotated[int, Range(0, LARGEST)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Layers = Annotated[int, Range(1, 10_000)]
LayerIndex = Annotated[int, Range(0, 9_999)]
Experts = Annotated[int, Range(1, 2**20)]
Vocabulary = Annotated[int, Range(1, 2**24)]
Iterations = Annotated[int, Range(1, 1_000_000)]

Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
Chance = Annotated[float, Range(0, 1, below=True)]
Weight = Annotated[float, Range(0, 1e6)]
NonNegative = Annotated[float, Range(0, 1e6)]
Factor = Annotated[float, Range(0, 1e6, above=True)]
# A factor of 0 would be no slot for one rule and as many as tokens for another.
CapacityFactor = Annotated[
    float,
    Range(
        0,
        1e6,
        above=True,
        instead="routing without dropping is dropless='always' of a "
        "Capacity, or a preset of such a model with capacity_factor unset",
    ),
]
# Fairseq writes -1 where evaluation takes the factor of training.
EvalShare = Annotated[float, Range(0, 1, also=(-1,))]
Growth = Annotated[float, Range(1, 1e6)]
Offset = Annotated[float, Range(-1e6, 1e6)]
# A smaller epsilon overflows float32 where its root is cubed, in the gradient of a norm of zeros.
Epsilon = Annotated[float, Range(1e-20, 1)]


class Ranged:
    """A dataclass whose numbers lie in the ranges that its fields declare."""

    def __post_init__(self):
        """Raises ``ConfigError`` for the first field whose number is outside its range."""
        hints = declared(type(self))
        for field in dataclasses.fields(self):
            check(
                hints[field.name], getattr(self, field.name), f"{type(self).__name__}.{field.name}"
            )


@functools.cache
def declared(owner: type | Callable[..., Any]) -> dict[str, Any]:
    """Returns the types of a dataclass's fields or of a function's choices, with their ranges."""
    hints = typing.get_type_hints(owner, include_extras=True)
    return {name: hint for name, hint in hints.items() if name != "return"}


def check(hint: Any, value: Any, path: str) -> None:
    """Checks every number of a setting.

    Args:
        hint: the declared type, with its range.
        value: the setting; arrays, and parts that check themselves, are left alone.
        path: its name, for messages.

    Raises:
        ConfigError: if a number is not finite or is outside the range.
    """
    if isinstance(value, tuple):
        (items, *_) = typing.get_args(hint) or (None,)
        for index, item in enumerate(value):
            check(items, item, f"{path}[{index}]")
    elif isinstance(value, numbers.Real):
        ranges = ranges_of(hint)
        for allowed in ranges:
            allowed.check(value, path)
        if not ranges and not _is_finite(value):
            raise ConfigError(f"{path}={value!r} must be finite")


def ranges_of(hint: Any) -> tuple[Range, ...]:
    """Returns the ranges in a declared type: of a number, an optional number or a list."""
    if typing.get_origin(hint) is Annotated:
        return tuple(mark for mark in hint.__metadata__ if isinstance(mark, Range))
    return tuple(mark for inner in typing.get_args(hint) for mark in ranges_of(inner))


def _computed(value: float) -> float:
    """Returns the number that a program computes with: a float32, where tiny ones are 0."""
    if isinstance(value, numbers.Integral):
        return value
    single = np.float32(value)
    return float(single) if abs(single) >= np.finfo(np.float32).tiny else 0.0


def _is_finite(value: float) -> bool:
    return isinstance(value, numbers.Integral) or math.isfinite(value)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
