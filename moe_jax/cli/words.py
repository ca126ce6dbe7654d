"""Flags whose value is words ``NAME=VALUE`` and settings, such as ``--growth="parts=2"``."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import values_of_texts
from moe_jax.errors import ConfigError, nearest

_SETTING = "config."


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


class Reader(NamedTuple):
    """A reader of the values of one name, and the values in words."""

    read: Callable[[str], Any]
    kind: str


INTEGER = Reader(int, "an integer")
INTEGERS = Reader(_integers, "a list of integers such as 0,3")
NUMBER = Reader(float, "a number")


def read(
    flag: str, text: str, readers: Mapping[str, Reader], experiment: Experiment
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the values of a flag by name, and the settings by dotted name.

    Args:
        flag: Flag with its value, for messages.
        text: Words ``NAME=VALUE`` and ``config.NAME=VALUE``, separated by spaces; quotes keep a
            value with spaces together.
        readers: Readers of the values, by name.
        experiment: Configuration whose settings ``config.NAME`` changes.

    Raises:
        ConfigError: If a word is no name of a value or of a setting, is given twice, or has a wrong
            value.
    """
    values: dict[str, Any] = {}
    texts: dict[str, str | None] = {}
    for name, value in _pairs(flag, text).items():
        if name.startswith(_SETTING):
            texts[name.removeprefix(_SETTING)] = value
        elif name in readers:
            values[name] = _value(flag, name, value or "", readers[name])
        else:
            raise ConfigError(f"{flag} has no {name!r}{nearest(name, [*readers, 'config.NAME'])}")
    try:
        return values, values_of_texts(experiment, texts)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from error


def _pairs(flag: str, text: str) -> dict[str, str | None]:
    """Returns the texts by name; the text of a word without ``=`` is ``None``."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: a quote has no end: {text}") from error
    found: dict[str, str | None] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name in found:
            raise ConfigError(f"{flag} has {name!r} twice: give it once")
        found[name] = value if equals else None
    return found


def _value(flag: str, name: str, text: str, reader: Reader) -> Any:
    try:
        return reader.read(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: {name}={text} is not {reader.kind}") from error
