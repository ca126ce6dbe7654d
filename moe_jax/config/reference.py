"""Settings described by type, range, default and meaning, from their dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from moe_jax import ranges
from moe_jax.config.experiment import Experiment

_NAMES = {int: "integer", float: "number", str: "text", bool: "`True` or `False`"}
# A larger upper end only keeps numbers inside the types of the program.
_UNBOUNDED = 10_000


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a run.

    Attributes:
        name: Dotted name, as in ``--config.NAME=VALUE``.
        value: Value in the run.
        kind: Type and range in words.
        default: Default as it would be written.
        meaning: Meaning in words.
    """

    name: str
    value: Any
    kind: str
    default: str
    meaning: str


def settings_of(experiment: Experiment) -> list[Setting]:
    """Returns every setting of a run, in the order of the dataclasses.

    Where several classes are possible, the setting ``type`` names the chosen one.
    """
    return list(_settings(experiment, ""))


def _settings(value: Any, path: str) -> Iterator[Setting]:
    cls = type(value)
    meanings, hints = attributes(cls), typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        name, found, hint = f"{path}{field.name}", getattr(value, field.name), hints[field.name]
        if not dataclasses.is_dataclass(found):
            meaning = meanings.get(field.name, "")
            yield Setting(name, found, kind(hint), default(field), meaning)
            continue
        options = classes(hint)
        if len(options) > 1:
            of = ", ".join(sorted(option.__name__ for option in options))
            what, chosen = meanings.get(field.name, ""), type(found).__name__
            yield Setting(f"{name}.type", chosen, f"one of {of}", default(field), what)
        yield from _settings(found, f"{name}.")


def classes(hint: Any) -> list[type]:
    """Returns the dataclasses that a setting may hold: one, or all of a union or interface."""
    if inspect.isabstract(hint):
        # A router that a notebook or a test adds is not part of the library.
        ours = (one for one in hint.__subclasses__() if one.__module__.startswith("moe_jax."))
        return [option for part in ours for option in classes(part)]
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    return [option for part in typing.get_args(hint) for option in classes(part)]


def is_interface(hint: Any) -> bool:
    """Returns whether a setting may hold any class of an interface, such as a router."""
    return any(inspect.isabstract(part) for part in (hint, *typing.get_args(hint)))


def attributes(cls: type) -> dict[str, str]:
    """Returns the meaning of every field, from the ``Attributes:`` of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        entries = re.split(r"^    (\w+): ", text.split("\n\n")[0], flags=re.MULTILINE)[1:]
        pairs = zip(entries[::2], entries[1::2], strict=True)
        found |= {name: " ".join(words.split()) for name, words in pairs}
    return found


def summary(cls: type) -> str:
    """Returns the first paragraph of a class's docstring."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())


def kind(hint: Any, link: Callable[[type], str] = lambda cls: cls.__name__) -> str:
    """Returns the type of a setting in words, with its range.

    Args:
        hint: Annotation of the setting.
        link: Function that returns the words for a class of settings.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        limits = [mark for mark in hint.__metadata__ if isinstance(mark, ranges.Range)]
        return " ".join(filter(None, [kind(parts[0], link), *map(_limits, limits)]))
    if origin is Literal:
        return ", ".join(f"`{option}`" for option in parts)
    if hint is type(None):
        return "`None`"
    if origin is tuple:
        return f"list of {kind(parts[0], link)}"
    if classes(hint):
        return ", ".join(map(link, classes(hint))) + (" or `None`" if type(None) in parts else "")
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind(part, link) for part in parts)
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _limits(limits: ranges.Range) -> str:
    low = f"{'>' if limits.above else '≥'} {limits.low:g}"
    high = f"{'<' if limits.below else '≤'} {limits.high:g}"
    shown = low if limits.high >= _UNBOUNDED else f"{low} and {high}"
    shown = "" if limits.low <= -_UNBOUNDED else shown
    return shown + "".join(f", or {value:g}" for value in limits.also)


def default(field: dataclasses.Field) -> str:
    """Returns the default of a setting as it would be written."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if dataclasses.is_dataclass(value):
        return type(value).__name__
    return f"`{list(value) if isinstance(value, tuple) else value!r}`"
