"""From a ``ConfigDict`` to frozen dataclasses, strictly: no unknown key, no wrong type."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from moe_jax import ranges, routing
from moe_jax.errors import ConfigError, nearest

# Evaluating annotations anew at every use would be most of the time that a config takes.
type_hints = functools.cache(typing.get_type_hints)


def build(cls: type, values: Mapping[str, Any] | ConfigDict, path: str = "config") -> Any:
    """Returns a ``cls`` made from ``values``.

    A field that holds a dataclass is built from a nested mapping; one that may hold several
    dataclasses names its own by ``type``, and one that may be left out is if all of it is ``None``.
    A router is a ``preset`` with its choices, or its parts;
    a setting or choice that is ``None`` is the part's or the preset's own.

    Args:
        cls: a dataclass.
        values: its fields; what is left out keeps its default.
        path: where ``values`` stands in the configuration, for messages.

    Raises:
        ConfigError: naming the key that is unknown, of the wrong type or out of range.
    """
    hints = type_hints(cls)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    made = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"{path}.{key} is not a setting{nearest(key, fields)}")
        made[key] = _convert(fields[key], value, f"{path}.{key}")
        ranges.check(ranges.declared(cls)[key], made[key], f"{path}.{key}")
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
    if origin in (typing.Union, types.UnionType) or inspect.isabstract(hint):
        return _convert_part(hint, value, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}={value!r} must be a list")
        return tuple(_convert(options[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    return _scalar(hint, value, path)


def _convert_part(hint: Any, value: Any, path: str) -> Any:
    options = typing.get_args(hint)
    if value is None and type(None) in options:
        return None
    simple = [option for option in options if option is not type(None)]
    if len(simple) == 1 and not inspect.isabstract(simple[0]):
        if simple[0] is routing.Router or not dataclasses.is_dataclass(simple[0]):
            return _convert(simple[0], value, path)
        values = {k: v for k, v in _mapping(value, path).items() if v is not None}
        return build(simple[0], values, path) if values else None
    values = {k: v for k, v in _mapping(value, path).items() if v is not None}
    known = _options(hint)
    name = values.pop("type", None)
    if name is None and type(None) in options and not values:
        return None
    if name not in known:
        raise ConfigError(f"{path}.type={name!r} is unknown{nearest(str(name), known)}")
    return build(known[name], values, path)


def _router(value: Any, path: str) -> routing.Router:
    values = {k: v for k, v in _mapping(value, path).items() if v is not None}
    if "preset" not in values:
        return build(routing.Router, values, path)
    name = values.pop("preset")
    hints, allowed = routing.choices_of(name), routing.choices_of(name, with_ranges=True)
    typed = {
        key: _convert(hints[key], choice, f"{path}.{key}") if key in hints else choice
        for key, choice in values.items()
    }
    for key in hints.keys() & typed.keys():
        ranges.check(allowed[key], typed[key], f"{path}.{key}")
    try:
        return routing.preset(name, **typed)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def settings(value: Any) -> ConfigDict:
    """Returns every setting of a dataclass, for overriding.

    Settings of the types that a part could be but is not are there too, unset. Lists are tuples,
    which alone can be overridden on a command line.
    """
    return _with_unset(type(value), ConfigDict(_in_tuples(describe(value)), convert_dict=True))


def _in_tuples(described: Any) -> Any:
    if isinstance(described, Mapping):
        return {key: _in_tuples(value) for key, value in described.items()}
    if isinstance(described, list):
        return tuple(map(_in_tuples, described))
    return described


def _with_unset(cls: type, config: ConfigDict) -> ConfigDict:
    for name, hint in type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            _with_unset(hint, config[name])
        if config[name] is None:
            config[name] = _unset_part(hint)
        options = _options(hint) if isinstance(config[name], ConfigDict) else {}
        if options and _chosen_by_type(hint) and config[name].type is not None:
            _with_unset(options[config[name].type], config[name])
        for option in options.values() if _chosen_by_type(hint) else ():
            for key, setting in type_hints(option).items():
                if key not in config[name]:
                    config[name][key] = unset(setting)
        if config[name] is None and not _options(hint):
            config[name] = unset(hint)
    return config


def _unset_part(hint: Any) -> ConfigDict | None:
    """The settings of a part that is left out, or ``None`` if it can have none."""
    if _chosen_by_type(hint):
        return ConfigDict({"type": placeholder(str)})
    if not _options(hint) or routing.Router in typing.get_args(hint):
        return None
    (option,) = _options(hint).values()
    return ConfigDict({key: unset(kind) for key, kind in type_hints(option).items()})


def unset(hint: Any) -> Any:
    """Returns a setting without a value that takes one of the type ``hint``."""
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if kind in (bool, int, float, str)]
    return placeholder(kinds[0] if kinds else str)


def _options(hint: Any) -> dict[str, type]:
    """The dataclasses that a part may be, by ``type``: those of a union, or of an interface."""
    found = {}
    for option in typing.get_args(hint) or (hint,):
        if dataclasses.is_dataclass(option):
            found[option.__name__] = option
        elif inspect.isabstract(option):
            for implementation in option.__subclasses__():
                found |= _options(implementation)
    return found


def _chosen_by_type(hint: Any) -> bool:
    interface = any(inspect.isabstract(option) for option in (hint, *typing.get_args(hint)))
    return interface or len(_options(hint)) > 1


def forget_other_types(cls: type, config: ConfigDict, overridden: Collection[str]) -> None:
    """Unsets what a config file chose for a part whose type or preset was overridden since.

    Args:
        cls: the dataclass that ``config`` describes.
        config: changed in place.
        overridden: dotted names of the settings given on the command line; they stay.
    """
    for path in overridden:
        *parents, last = path.split(".")
        group, hint = config, cls
        for key in parents:
            if _chosen_by_type(hint):
                # Building refuses a type that does not exist, and names those that do.
                hint = _options(hint).get(group.type, cls)
            group, hint = group[key], type_hints(hint).get(key)
        if last == "type":
            kept = type_hints(_options(hint).get(group.type, cls))
        elif last == "preset" and hint is routing.Router:
            kept = routing.choices_of(group.preset)
        else:
            continue
        for key in set(group) - {last, *kept}:
            if ".".join((*parents, key)) not in overridden:
                with group.ignore_type():
                    group[key] = None


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
        hints = type_hints(type(value))
        return {
            field.name: _described_field(hints[field.name], getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    return value


def _described_field(hint: Any, value: Any) -> Any:
    if isinstance(value, tuple):
        return [_described_field(typing.get_args(hint)[0], item) for item in value]
    described = describe(value)
    if dataclasses.is_dataclass(value) and _chosen_by_type(hint):
        return {"type": type(value).__name__, **described}
    return described
