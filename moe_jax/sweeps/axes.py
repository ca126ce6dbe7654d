"""The settings that a sweep changes: lists of values, or ranges for a sampler."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from moe_jax.errors import ConfigError

# One value of each axis, as the text that a command line gives.
Point: TypeAlias = Mapping[str, str]
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(f"({_NUMBER}):({_NUMBER})(:log)?")
_COUNT = re.compile(r"(\d+)\.\.(\d+)")
# The seed of a run fixes both the initial weights and the order of the data.
_TOGETHER = {"seed": ("training.seed", "data.seed")}
_LONGEST_NAME = 120


@dataclasses.dataclass(frozen=True)
class Axis:
    """A setting with the values that a sweep gives to it.

    Attributes:
        name: Dotted name of the setting; ``seed`` stands for ``training.seed`` and ``data.seed``.
        texts: Values as on a command line; the two ends of a range.
        is_range: Whether a sampler draws values between the two ends.
        log: Whether the sampler draws the logarithm of the value.
        whole: Whether the sampler draws whole numbers.
    """

    name: str
    texts: tuple[str, ...]
    is_range: bool = False
    log: bool = False
    whole: bool = False

    @property
    def settings(self) -> tuple[str, ...]:
        """Dotted names of the settings that have the value of the axis."""
        return _TOGETHER.get(self.name, (self.name,))


def axis_of(name: str, values: str | Iterable[Any]) -> Axis:
    """Returns the axis of a setting.

    Args:
        name: Dotted name of the setting, or ``seed``.
        values: Values; or a text of values separated by commas, of whole numbers ``0..3``, or of a
            range ``1e-4:1e-2`` or ``1e-4:1e-2:log``.

    Raises:
        ConfigError: If there is no value, a value is given twice, or a range is empty.
    """
    if not isinstance(values, str):
        return _listed(name, tuple(map(str, values)))
    text = values.strip()
    if found := _RANGE.fullmatch(text):
        return _ranged(name, found[1], found[2], log=bool(found[3]))
    if found := _COUNT.fullmatch(text):
        return _listed(name, tuple(map(str, range(int(found[1]), int(found[2]) + 1))))
    return _listed(name, tuple(part.strip() for part in _split(text)))


def axes_of(over: Mapping[str, Any] | Sequence[str]) -> list[Axis]:
    """Returns the axes of a mapping by setting, or of texts ``NAME=VALUES``.

    Raises:
        ConfigError: If a text has no name or no value, or two axes change one setting.
    """
    pairs = over.items() if isinstance(over, Mapping) else map(_pair, over)
    axes = [axis_of(name, values) for name, values in pairs]
    if not axes:
        raise ConfigError("a sweep needs a setting to change: try --over seed=0..3")
    seen: set[str] = set()
    for name in itertools.chain.from_iterable(axis.settings for axis in axes):
        if name in seen:
            raise ConfigError(f"two --over change {name}: give all its values in one")
        seen.add(name)
    return axes


def grid(axes: Sequence[Axis]) -> Iterator[Point]:
    """Yields every combination of values; the last axis changes first.

    Raises:
        ConfigError: If an axis is a range, which has no list of values.
    """
    for axis in axes:
        if axis.is_range:
            low, high = axis.texts
            raise ConfigError(
                f"--over {axis.name}={low}:{high} is a range, from which a sampler draws: add "
                "--sampler=tpe --trials=20, or list values separated by commas"
            )
    for values in itertools.product(*(axis.texts for axis in axes)):
        yield dict(zip((axis.name for axis in axes), values, strict=True))


def settings_of(point: Point) -> dict[str, str]:
    """Returns the settings of a point by dotted name."""
    return {name: text for axis, text in point.items() for name in _TOGETHER.get(axis, (axis,))}


def name_of(point: Point) -> str:
    """Returns the name of a point's folder, such as ``optimizer.learning_rate=1e-3,seed=0``."""
    whole = ",".join(f"{name}={text}" for name, text in point.items())
    name = re.sub(r"[^\w.,=+-]", "-", whole)[:_LONGEST_NAME]
    if name == whole:
        return name
    return f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _pair(text: str) -> tuple[str, str]:
    name, equals, values = text.partition("=")
    if not (name and equals and values):
        raise ConfigError(
            f"--over {text} is not NAME=VALUES: try --over optimizer.learning_rate=1e-3,3e-3"
        )
    return name.removeprefix("config."), values


def _listed(name: str, texts: tuple[str, ...]) -> Axis:
    if not all(texts) or not texts:
        raise ConfigError(f"--over {name} has an empty value: separate values by single commas")
    twice = next((text for text in texts if texts.count(text) > 1), None)
    if twice is not None:
        raise ConfigError(f"--over {name} has the value {twice} twice: remove one")
    return Axis(name, texts)


def _ranged(name: str, low: str, high: str, *, log: bool) -> Axis:
    if float(low) >= float(high):
        raise ConfigError(f"--over {name}={low}:{high} is an empty range: put the lower end first")
    if log and float(low) <= 0:
        raise ConfigError(f"--over {name}={low}:{high}:log needs a lower end above 0")
    return Axis(name, (low, high), is_range=True, log=log)


def _split(text: str) -> list[str]:
    """Returns the parts between commas that are outside brackets, as in ``(0, 2),(1, 3)``."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts
