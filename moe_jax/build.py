"""From a ``ConfigDict`` to frozen dataclasses, strictly: no unknown key, no wrong type."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from moe_jax import routing
from moe_jax.errors import ConfigError, nearest


def build(cls: type, values: Mapping[str, Any] | ConfigDict, path: str = "config") -> Any:
    """Returns a ``cls`` made from ``values``.

    A field that holds a dataclass is built from a nested mapping; one that may hold several
    dataclasses names its own by ``type``. A router is a ``preset`` with its choices, or its parts;
    a choice that is ``None`` is the preset's own.

    Args:
        cls: a dataclass.
        values: its fields; what is left out keeps its default.
        path: where ``values`` stands in the configuration, for messages.

    Raises:
        ConfigError: naming the key that is unknown, of the wrong type or out of range.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    made = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"{path}.{key} is not a setting{nearest(key, fields)}")
        made[key] = _convert(fields[key], value, f"{path}.{key}")
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in made
    ]
    if missing:
        raise ConfigError(f"{path} needs {', '.join(missing)}")
    try:
        return cls(**made)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is routing.Router:
        return _router(value, path)
    if dataclasses.is_dataclass(hint):
        return build(hint, _mapping(value, path), path)
    if origin is typing.Literal:
        if value not in options:
            raise ConfigError(f"{path}={value!r} is not one of {', '.join(map(str, options))}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(options, value, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}={value!r} must be a list")
        return tuple(_convert(options[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    return _scalar(hint, value, path)


def _convert_union(options: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    if len(options) == 1:
        return _convert(options[0], value, path)
    values = dict(_mapping(value, path).items())
    known = {option.__name__: option for option in options}
    name = values.pop("type", None)
    if name not in known:
        raise ConfigError(f"{path}.type={name!r} is unknown{nearest(str(name), known)}")
    return build(known[name], values, path)


def _router(value: Any, path: str) -> routing.Router:
    values = {k: v for k, v in _mapping(value, path).items() if v is not None}
    if "preset" not in values:
        return build(routing.Router, values, path)
    name = values.pop("preset")
    presets = {function.__name__: function for function in routing.PRESETS}
    hints = typing.get_type_hints(presets[name]) if name in presets else {}
    typed = {
        key: _convert(hints[key], choice, f"{path}.{key}") if key in hints else choice
        for key, choice in values.items()
    }
    try:
        return routing.preset(name, **typed)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _mapping(value: Any, path: str) -> Mapping[str, Any] | ConfigDict:
    if isinstance(value, Mapping | ConfigDict):
        return value
    raise ConfigError(f"{path}={value!r} must be a group of settings")


def _scalar(hint: type, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{path}={value!r} must be {hint.__name__}, not {type(value).__name__}")
    return value


def describe(value: Any) -> Any:
    """Returns plain dicts, lists and scalars from which ``build`` makes ``value`` again."""
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        return {
            field.name: _described_field(hints[field.name], getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    return value


def _described_field(hint: Any, value: Any) -> Any:
    if isinstance(value, tuple):
        return [_described_field(typing.get_args(hint)[0], item) for item in value]
    described = describe(value)
    choices = [option for option in typing.get_args(hint) if dataclasses.is_dataclass(option)]
    return {"type": type(value).__name__, **described} if len(choices) > 1 else described
