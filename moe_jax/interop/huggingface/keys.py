"""Checks every key and value of a ``config.json`` and fills in the defaults."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

from moe_jax.errors import ConfigError

Json = dict[str, Any]
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    object: "a value",
}


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of ``config.json`` that determines the model.

    Attributes:
        kind: Type of the value.
        default: Value for a file without the key, as in ``transformers``.
        null: Whether the value may be null, which means that the model lacks the feature.
        least: Smallest number that is accepted; ``None`` accepts all.
        only: Values that are supported; an empty tuple accepts all.
        items: Type of the elements of a list.
    """

    kind: type
    default: Any = None
    null: bool = False
    least: float | None = None
    only: tuple[Any, ...] = ()
    items: type | None = None


def size(default: int | None, least: int = 1, *, null: bool = False) -> Key:
    """Returns a key whose value is a whole number."""
    return Key(int, default, null, least)


def number(default: float | None, least: float | None = None, *, null: bool = False) -> Key:
    """Returns a key whose value is a number."""
    return Key(float, default, null, least)


@dataclasses.dataclass(frozen=True)
class Keys:
    """All keys that the files of a family may have.

    Attributes:
        read: Keys that determine the model.
        unread: Keys that do not change the model, each with the reason.
        aliases: Other names of the keys in ``read``.
        inside: Keys of the objects within the configuration, by the name of the object.
    """

    read: Mapping[str, Key]
    unread: Mapping[str, str]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inside: Mapping[str, Keys] = dataclasses.field(default_factory=dict)

    def filled(self, config: Any, where: str = "config.json") -> Json:
        """Returns the keys in ``read``, each with its value in the file or its default.

        Raises:
            ConfigError: If ``config`` is not an object, or a key is unknown or has an impossible
                value.
        """
        given = self._renamed(require(config, dict, where), where)
        self._check_names(given, where)
        values = {name: _value(name, key, given, where) for name, key in self.read.items()}
        for name, keys in self.inside.items():
            values[name] = keys.filled(values[name] or {}, f"{name} in {where}")
        return values

    def _renamed(self, config: Json, where: str) -> Json:
        renamed = dict(config)
        for other, name in self.aliases.items():
            if other not in renamed:
                continue
            value = renamed.pop(other)
            if renamed.get(name, value) != value:
                raise ConfigError(
                    f"{where} says {name}={renamed[name]!r} and {other}={value!r}, which are two "
                    "names of one setting: remove one of them"
                )
            renamed[name] = value
        return renamed

    def _check_names(self, given: Json, where: str) -> None:
        known = {*self.read, *self.unread, *self.aliases}
        for name in given:
            if name in known or name.startswith("_"):
                continue
            close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
            raise ConfigError(
                f"{where} has the key {name!r}, which this family does not have; the nearest key "
                f"is {close[0]!r}: correct the key, or remove it if it does not change the model"
            )


def require(value: Any, kind: type, what: str) -> Any:
    """Returns ``value`` if it has the JSON type that corresponds to ``kind``.

    Args:
        value: The value.
        kind: The Python type; ``float`` also accepts whole numbers and excludes infinities.
        what: Name of the value in the error message.

    Raises:
        ConfigError: If the value has another type.
    """
    right = isinstance(value, (int, float) if kind is float else kind)
    if kind in (int, float) and isinstance(value, bool):
        right = False
    if right and kind is float and not math.isfinite(value):
        right = False
    if not right:
        raise ConfigError(f"{what} is {_shown(value)}, but it must be {_WORDS[kind]}")
    return value


def _value(name: str, key: Key, given: Json, where: str) -> Any:
    value = given.get(name, key.default)
    if value is None:
        if not key.null:
            lack = f"says {name}=null, but it" if name in given else f"lacks {name}, which"
            raise ConfigError(f"{where} {lack} must be {_WORDS[key.kind]}")
        return None
    require(value, key.kind, f"{name} in {where}")
    if key.items is not None:
        for item in value:
            require(item, key.items, f"an element of {name} in {where}")
    if key.least is not None and value < key.least:
        raise ConfigError(f"{name} in {where} is {value!r}, but it must be at least {key.least}")
    if key.only and value not in key.only:
        allowed = " or ".join(map(repr, key.only))
        raise ConfigError(f"{where} says {name}={value!r}, but only {allowed} is supported")
    return value


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."
