"""Conversion of a ``ConfigDict`` to frozen dataclasses; it rejects unknown keys and wrong types."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import tuple_parser

from moe_jax import ranges, routing
from moe_jax.errors import ConfigError, nearest

# The cache saves most of the time that a config takes, which is the evaluation of annotations.
type_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)
# ``bool`` comes first, because ``bool`` is a subclass of ``int``.
_PARSERS: dict[type, flags.ArgumentParser] = {
    bool: flags.BooleanParser(),
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
}


def build(cls: type, values: Mapping[str, Any] | ConfigDict, path: str = "config") -> Any:
    """Returns an instance of ``cls`` with the fields ``values``.

    A nested mapping builds a field that holds a dataclass. If the field has several possible
    classes, the key ``type`` selects one. An optional field is ``None`` if all its settings are
    ``None``. A router is given by the key ``preset`` with the choices of the preset, or by its
    parts. In a router or an optional field, a setting of ``None`` selects the default.

    Args:
        cls: A dataclass.
        values: Values of the fields; a field without a value has its default.
        path: Dotted name of ``values`` in the configuration, for messages.

    Raises:
        ConfigError: If a key is unknown or its value has the wrong type or is out of range; the
            message names the key.
    """
    hints = type_hints(cls)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    converted = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"{path}.{key} is not a setting{nearest(key, fields)}")
        converted[key] = _convert(fields[key], value, f"{path}.{key}")
        ranges.check(ranges.declared(cls)[key], converted[key], f"{path}.{key}")
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in converted
    ]
    if missing:
        raise ConfigError(f"{path} needs {', '.join(missing)}")
    try:
        return cls(**converted)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _is_dataclass(hint: Any) -> TypeGuard[type]:
    """Returns whether a setting of type ``hint`` is a dataclass; an interface has several."""
    known = isinstance(hint, type) and dataclasses.is_dataclass(hint)
    return known and not inspect.isabstract(hint)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Returns the value of a setting of type ``hint``."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is routing.Router:
        return _router(value, path)
    if _is_dataclass(hint):
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
    """Returns the value of a setting that is optional or has several possible classes."""
    options = typing.get_args(hint)
    if value is None and type(None) in options:
        return None
    classes = [option for option in options if option is not type(None)]
    if len(classes) == 1 and not inspect.isabstract(classes[0]):
        if classes[0] is routing.Router or not _is_dataclass(classes[0]):
            return _convert(classes[0], value, path)
        values = {k: v for k, v in _mapping(value, path).items() if v is not None}
        return build(classes[0], values, path) if values else None
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
    """Returns the settings in force of a dataclass.

    A part that is ``None`` becomes an empty group, from which ``build`` returns ``None``. A list
    becomes a tuple.
    """
    hints, config = type_hints(type(value)), ConfigDict()
    for field in dataclasses.fields(value):
        hint, part = hints[field.name], getattr(value, field.name)
        if dataclasses.is_dataclass(part):
            name = {"type": type(part).__name__} if _chosen_by_type(hint) else {}
            config[field.name] = ConfigDict({**name, **settings(part)})
        elif part is None and _options(hint):
            config[field.name] = ConfigDict()
        else:
            config[field.name] = _in_tuples(_described_field(hint, part))
    return config


def _in_tuples(described: Any) -> Any:
    if isinstance(described, Mapping):
        return {key: _in_tuples(value) for key, value in described.items()}
    if isinstance(described, list):
        return tuple(map(_in_tuples, described))
    return described


def override(
    cls: type,
    config: ConfigDict,
    changes: Mapping[str, Any],
    read: Callable[[str, Any, Any], Any] = lambda name, hint, value: value,
) -> None:
    """Changes settings by their dotted names.

    A change of ``type`` or ``preset`` removes the settings that the new class or preset lacks.

    Args:
        cls: The dataclass that ``config`` describes.
        config: The settings, which are changed in place.
        changes: New values by dotted name, such as ``model.moe.num_experts``.
        read: Function from the name of a setting, its type and the given value to the new value.

    Raises:
        ConfigError: If a setting does not exist; the message names it.
    """
    with config.unlocked(), config.ignore_type():
        # A ``type`` or ``preset`` comes first, because it determines the settings of its group.
        for name in sorted(changes, key=lambda name: (name.count("."), not _chooses(name))):
            *parents, last = name.split(".")
            group, hint, path = _group(cls, config, parents)
            value = read(name, _setting(hint, group, last, path), changes[name])
            if last == "preset" and group.get("preset") is None:
                # The settings of a router's parts are not choices of a preset.
                _remove_all_but(group, set())
            group[last] = value
            if _chooses(name):
                _remove_all_but(group, {last, *_settings_of(hint, group, path)})


def _group(cls: type, config: ConfigDict, keys: Sequence[str]) -> tuple[ConfigDict, Any, str]:
    """Returns the group of settings at nested keys, its type and its dotted name."""
    group, hint, path = config, cls, "config"
    for key in keys:
        hint = _setting(hint, group, key, path)
        if group.get(key) is None:
            group[key] = ConfigDict()
        group, path = group[key], f"{path}.{key}"
    return group, hint, path


def _remove_all_but(group: ConfigDict, keys: set[str]) -> None:
    for key in set(group) - keys:
        del group[key]


def _chooses(name: str) -> bool:
    """Returns True if a setting selects the class or the preset of its group."""
    return name.rpartition(".")[2] in ("type", "preset")


def _choice_of(hint: Any) -> dict[str, Any]:
    """Returns the setting that determines the other settings of a group, with its type."""
    if routing.Router in (hint, *typing.get_args(hint)):
        return {"preset": str}
    return {"type": str} if _chosen_by_type(hint) else {}


def _setting(hint: Any, group: Any, key: str, path: str) -> Any:
    """Returns the type of a setting of a group."""
    if not isinstance(group, ConfigDict):
        raise ConfigError(f"{path} is not a group of settings: it has no {key}")
    choice = _choice_of(hint)
    if key in choice:
        return choice[key]
    known = _settings_of(hint, group, path)
    if key not in known:
        raise ConfigError(f"{path}.{key} is not a setting{nearest(key, known)}")
    return known[key]


def _settings_of(hint: Any, group: ConfigDict, path: str) -> dict[str, Any]:
    """Returns the settings that a group can have, with their types."""
    options = _options(hint)
    if "preset" in _choice_of(hint) and group.get("preset") is not None:
        return routing.choices_of(group.preset)
    if _chosen_by_type(hint):
        name = group.get("type")
        if name not in options:
            raise ConfigError(f"{path}.type={name!r} is unknown{nearest(str(name), options)}")
        return type_hints(options[str(name)])
    return {key: kind for option in options.values() for key, kind in type_hints(option).items()}


def from_text(hint: Any, text: str) -> Any:
    """Returns the value of a setting from the text on a command line.

    Args:
        hint: Type of the setting.
        text: The text.

    Raises:
        ValueError: If the text is not a value of this type.
    """
    options = [hint] if typing.get_origin(hint) is typing.Literal else typing.get_args(hint)
    if type(None) in options and text in ("None", "none"):
        return None
    if typing.get_origin(hint) is tuple:
        named = options[0] is str or typing.get_origin(options[0]) is typing.Literal
        if named and not text.startswith(("(", "[")):
            return tuple(part.strip() for part in text.split(","))
        return tuple_parser.TupleParser().parse(text)
    if _options(hint):
        return _group_from_text(text)
    for kind, parser in _PARSERS.items():
        if kind in (hint, *options):
            return parser.parse(text)
    return text


def _group_from_text(text: str) -> dict[str, Any]:
    try:
        value = ast.literal_eval(text)
    except SyntaxError:
        value = None
    if not isinstance(value, dict):
        raise ValueError("this is a group of settings: set them one by one")
    return value


def _options(hint: Any) -> dict[str, type]:
    """Returns the possible classes of a setting by name, from its union or its interface."""
    options: dict[str, type] = {}
    for option in typing.get_args(hint) or (hint,):
        if _is_dataclass(option):
            options[option.__name__] = option
        elif inspect.isabstract(option):
            for implementation in option.__subclasses__():
                options |= _options(implementation)
    return options


def _chosen_by_type(hint: Any) -> bool:
    """Returns True if the key ``type`` selects the class of a setting."""
    interface = any(inspect.isabstract(option) for option in (hint, *typing.get_args(hint)))
    return interface or len(_options(hint)) > 1


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
    """Returns ``value`` as plain dicts, lists and scalars, from which ``build`` restores it."""
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


def flat(described: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the settings of ``describe`` by dotted name; an item of a list has its index."""
    if isinstance(described, Mapping):
        parts = [flat(item, f"{prefix}{key}.") for key, item in described.items()]
    elif isinstance(described, list | tuple):
        parts = [flat(item, f"{prefix}{i}.") for i, item in enumerate(described)]
    else:
        return {prefix[:-1]: described}
    return {key: item for part in parts for key, item in part.items()}
