"""Configs from Python: a name, a file or settings, with overrides by dotted names."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moe_jax.config.experiment import Experiment
from moe_jax.config.library import config_file, module_of
from moe_jax.config.schema import build, forget_other_types, settings
from moe_jax.errors import ConfigError, fault_in, nearest

Config = str | Path | ConfigDict | Experiment


def load_config(config: Config, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Returns the settings of a config, to look at and to change.

    Args:
        config: the name of a config of the package, with a variant after a colon
            (``quickstart:gshard``), a file, settings, or an experiment.
        overrides: settings to change, by dotted name.

    Raises:
        ConfigError: if there is no such config or setting, or a value has the wrong type.

    Examples:
        >>> import moe_jax as mj
        >>> config = mj.load_config("quickstart", {"model.width": 64})
        >>> config.model.width, config.training.steps
        (64, 600)
        >>> config.training.steps = 100  # the same as an override
    """
    found = _settings_of(config)
    for name, value in (overrides or {}).items():
        _override(found, name, value)
    return found


def experiment_of(config: Config, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Returns a whole run's configuration, typed and checked.

    Args:
        config: see ``load_config``.
        overrides: settings to change, by dotted name; the same rules hold as on a command line.

    Raises:
        ConfigError: if there is no such config or setting, a value is wrong, or settings do not go
            together.

    Examples:
        >>> import moe_jax as mj
        >>> experiment = mj.experiment("quickstart:gshard", {"training.steps": 100})
        >>> experiment.training.steps, experiment.model.moe.num_experts
        (100, 16)
    """
    if isinstance(config, Experiment) and not overrides:
        config.check_settings()
        return config
    return typed(load_config(config, overrides), overrides or {})


def typed(config: ConfigDict, overridden: Collection[str]) -> Experiment:
    """Returns the experiment of settings that go together.

    Args:
        config: changed in place: what it chose for a part of another type is unset.
        overridden: dotted names of the settings that were changed since the config was made.

    Raises:
        ConfigError: naming the setting to change.
    """
    forget_other_types(Experiment, config, overridden)
    experiment = build(Experiment, config)
    experiment.check_settings()
    return experiment


def _settings_of(config: Config) -> ConfigDict:
    if isinstance(config, Experiment):
        return settings(config)
    if isinstance(config, ConfigDict):
        return copy.deepcopy(config)
    name, colon, argument = str(config).partition(":")
    file = config_file(name)
    found = _made_by(file, [argument] if colon else [])
    if not isinstance(found, ConfigDict):
        kind = type(found).__name__
        raise ConfigError(f"get_config() of {file} returns {kind}, not a ConfigDict: return it")
    return found


def _made_by(file: Path, arguments: list[str]) -> Any:
    """Returns what ``get_config`` of a file returns."""
    module = module_of(file, "the config file")
    if not hasattr(module, "get_config"):
        raise ConfigError(f"the config file {file} has no function get_config()")
    try:
        return module.get_config(*arguments)
    except ConfigError:
        raise
    except Exception as error:
        fault = fault_in(file, error)
        if fault is None:
            raise
        raise ConfigError(f"the config file cannot be loaded: {fault}") from error


def _override(config: ConfigDict, name: str, value: Any) -> None:
    *parents, last = name.split(".")
    group: Any = config
    for part in (*parents, last):
        if not isinstance(group, ConfigDict) or part not in group:
            known = group.keys() if isinstance(group, ConfigDict) else ()
            raise ConfigError(f"the configuration has no setting {name!r}{nearest(part, known)}")
        group, owner = group[part], group
    if isinstance(group, ConfigDict):
        raise ConfigError(f"{name} is a group of settings: override them one by one")
    try:
        owner[last] = value
    except TypeError as error:
        raise ConfigError(f"{name}={value!r} has the wrong type: {error}") from error
