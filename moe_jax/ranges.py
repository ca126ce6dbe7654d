"""Ranges of settings: the type of a setting declares its range, and this module checks it.

The types ``Positive`` or ``Share`` are ``int`` or ``float`` annotated with a ``Range``. The fields
of settings and the choices of router presets have these types. No range contains NaN or infinity.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeGuard

import numpy as np

from moe_jax.errors import ConfigError

# Arrays are indexed by int32 on every backend.
LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval of numbers.

    Attributes:
        low: Lower end of the interval.
        high: Upper end of the interval.
        above: True excludes ``low``.
        below: True excludes ``high``.
        also: Numbers outside the interval that are allowed too, because they have a special
            meaning.
        instead: Advice for a number outside the range, for messages.
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
        """Rejects a number outside the range.

        Args:
            value: The number.
            path: Name of the setting, for messages.

        Raises:
            ConfigError: If the number is outside the range.
        """
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
ExpertIndex = Annotated[int, Range(0, 2**20 - 1)]
Vocabulary = Annotated[int, Range(1, 2**24)]
Iterations = Annotated[int, Range(1, 1_000_000)]

Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, above=True)]
Chance = Annotated[float, Range(0, 1, below=True)]
Weight = Annotated[float, Range(0, 1e6)]
NonNegative = Annotated[float, Range(0, 1e6)]
Factor = Annotated[float, Range(0, 1e6, above=True)]
# The papers give a factor of 0 two meanings: no slots, or as many slots as tokens.
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
# In fairseq, -1 means that evaluation has the factor of training.
EvalShare = Annotated[float, Range(0, 1, also=(-1,))]
Ratio = Annotated[float, Range(1, 1e6)]
Growth = Annotated[float, Range(1, 1e6)]
Offset = Annotated[float, Range(-1e6, 1e6)]
# The gradient of a norm of zeros contains the inverse cube of the root of epsilon, which overflows
# float32 for a smaller epsilon.
Epsilon = Annotated[float, Range(1e-20, 1)]


class Ranged:
    """Base of dataclasses whose fields declare ranges, which their numbers must obey."""

    def __post_init__(self):
        """Raises ``ConfigError`` for the first field with a number outside its range."""
        hints = declared(type(self))
        for field in dataclasses.fields(self):
            check(
                hints[field.name], getattr(self, field.name), f"{type(self).__name__}.{field.name}"
            )


@functools.cache
def declared(owner: type | Callable[..., Any]) -> dict[str, Any]:
    """Returns the types and ranges of the fields of a dataclass or the arguments of a function."""
    hints = typing.get_type_hints(owner, include_extras=True)
    return {name: hint for name, hint in hints.items() if name != "return"}


def check(hint: Any, value: Any, path: str) -> None:
    """Rejects a setting with a number outside its range.

    Args:
        hint: Declared type of the setting, with its range.
        value: Value of the setting: a number or a tuple. Other values pass unchecked, because
            dataclasses check their own numbers.
        path: Name of the setting, for messages.

    Raises:
        ConfigError: If a number is not finite or is outside its range.
    """
    if isinstance(value, tuple):
        (items, *_) = typing.get_args(hint) or (None,)
        for index, item in enumerate(value):
            check(items, item, f"{path}[{index}]")
    elif _is_number(value):
        ranges = ranges_of(hint)
        for allowed in ranges:
            allowed.check(value, path)
        if not ranges and not _is_finite(value):
            raise ConfigError(f"{path}={value!r} must be finite")


def ranges_of(hint: Any) -> tuple[Range, ...]:
    """Returns the ranges in the declared type of a number, an optional number or a list."""
    if typing.get_origin(hint) is Annotated:
        return tuple(mark for mark in hint.__metadata__ if isinstance(mark, Range))
    return tuple(mark for inner in typing.get_args(hint) for mark in ranges_of(inner))


def _computed(value: float) -> float:
    """Returns the number as float32, as a program reads it: a subnormal number is 0."""
    if isinstance(value, numbers.Integral):
        return value
    single = np.float32(value)
    return float(single) if abs(single) >= np.finfo(np.float32).tiny else 0.0


def _is_number(value: Any) -> TypeGuard[float]:
    """Returns True for every real number, also of NumPy's types."""
    return isinstance(value, numbers.Real)


def _is_finite(value: float) -> bool:
    return isinstance(value, numbers.Integral) or math.isfinite(value)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
