"""A ``config.json`` with every key known, every default filled in and every value checked."""

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
}


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of ``config.json`` that the model is read from.

    Attributes:
        kind: the type of its values.
        default: its value where a file has no such key, as in ``transformers``.
        null: whether a file may say null, which then means that there is none.
        least: the smallest number that it may be; ``None`` for any.
        only: the values that are supported; none for all.
        items: the type of the elements of a list.
    """

    kind: type
    default: Any = None
    null: bool = False
    least: float | None = None
    only: tuple[Any, ...] = ()
    items: type | None = None


def size(default: int | None, least: int = 1, *, null: bool = False) -> Key:
    """Returns the key of a whole number."""
    return Key(int, default, null, least)


def number(default: float | None, least: float | None = None, *, null: bool = False) -> Key:
    """Returns the key of a number."""
    return Key(float, default, null, least)


@dataclasses.dataclass(frozen=True)
class Keys:
    """All keys that the files of a family have.

    Attributes:
        read: the keys that the model is read from.
        unread: keys that change nothing here, each with the reason.
        aliases: other names of keys of ``read``.
        inside: the keys of objects within the configuration, by their key.
    """

    read: Mapping[str, Key]
    unread: Mapping[str, str]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inside: Mapping[str, Keys] = dataclasses.field(default_factory=dict)

    def filled(self, config: Any, where: str = "config.json") -> Json:
        """Returns the keys of ``read``, each with the value of a file or its default.

        Raises:
            ConfigError: if the file is no object, or a key is unknown or has an impossible value.
        """
        given = self._renamed(require(config, dict, where), where)
        self._check_names(given, where)
        found = {name: _value(name, key, given, where) for name, key in self.read.items()}
        for name, keys in self.inside.items():
            found[name] = keys.filled(found[name] or {}, f"{name} in {where}")
        return found

    def _renamed(self, config: Json, where: str) -> Json:
        found = dict(config)
        for other, name in self.aliases.items():
            if other not in found:
                continue
            value = found.pop(other)
            if found.get(name, value) != value:
                raise ConfigError(
                    f"{where} says {name}={found[name]!r} and {other}={value!r}, which are two "
                    "names of one setting: remove one of them"
                )
            found[name] = value
        return found

    def _check_names(self, given: Json, where: str) -> None:
        known = {*self.read, *self.unread, *self.aliases}
        for name in given:
            if name in known or name.startswith("_"):
                continue
            close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
            raise ConfigError(
                f"{where} has the key {name!r}, which this family does not have; the nearest key "
                f"is {close[0]!r}: correct it, or remove it if it changes nothing"
            )


def require(value: Any, kind: type, what: str) -> Any:
    """Returns ``value`` if it is of the type that JSON has for ``kind``.

    Raises:
        ConfigError: otherwise, naming it as ``what``.
    """
    right = isinstance(value, (int, float) if kind is float else kind)
    if kind in (int, float) and isinstance(value, bool):
        right = False
    if right and kind is float and not math.isfinite(value):
        right = False
    if not right:
        raise ConfigError(f"{what} is {_shown(value)}, and it must be {_WORDS[kind]}")
    return value


def _value(name: str, key: Key, given: Json, where: str) -> Any:
    value = given.get(name, key.default)
    if value is None:
        if not key.null:
            lacks = f"says {name}=null" if name in given else f"lacks {name}"
            raise ConfigError(f"{where} {lacks}, and it must be {_WORDS[key.kind]}")
        return None
    require(value, key.kind, f"{name} in {where}")
    for item in value if key.items else ():
        require(item, key.items, f"an element of {name} in {where}")
    if key.least is not None and value < key.least:
        raise ConfigError(f"{name} in {where} is {value!r}, and it must be at least {key.least}")
    if key.only and value not in key.only:
        allowed = " or ".join(map(repr, key.only))
        raise ConfigError(f"{where} says {name}={value!r}, which is only supported as {allowed}")
    return value


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."
