"""Configs from Python: a name, a file or settings, with overrides by dotted names."""

from __future__ import annotations

import copy
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from moe_jax.config.experiment import Experiment
from moe_jax.config.library import config_file, module_of
from moe_jax.config.schema import build, from_text, override, settings
from moe_jax.errors import ConfigError, fault_in, line_of, plain

Config: TypeAlias = str | Path | ConfigDict | Experiment


def load_config(config: Config, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
    """Returns the settings of a config, which the caller can read and change.

    Args:
        config: The name of a config of the package, with a variant after a colon
            (``quickstart:gshard``); a file; settings; or an experiment.
        overrides: New values of settings, by dotted name.

    Raises:
        ConfigError: If the config or a setting does not exist.

    Examples:
        >>> import moe_jax as mj
        >>> config = mj.load_config("quickstart", {"model.width": 64})
        >>> config.model.width, config.training.steps
        (64, 600)
        >>> config.training.steps = 100  # the same as an override
    """
    values = _settings_of(config)
    override(Experiment, values, overrides or {})
    return values


def experiment_of(config: Config, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Returns the settings of a run, typed and checked.

    Args:
        config: See ``load_config``.
        overrides: New values of settings, by dotted name, by the same rules as on a command line.

    Raises:
        ConfigError: If the config or a setting does not exist, a value has the wrong type or is out
            of range, or settings contradict each other.

    Examples:
        >>> import moe_jax as mj
        >>> experiment = mj.experiment("quickstart:gshard", {"training.steps": 100})
        >>> experiment.training.steps, experiment.model.moe.num_experts
        (100, 16)
    """
    if isinstance(config, Experiment) and not overrides:
        config.check_settings()
        return config
    experiment = build(Experiment, load_config(config, overrides))
    experiment.check_settings()
    return experiment


def experiment_of_texts(
    config: Config, texts: Mapping[str, str | None]
) -> tuple[Experiment, dict[str, Any]]:
    """Returns the experiment of ``--config=NAME:ARGUMENT`` and ``--config.NAME=TEXT``, checked.

    Args:
        config: See ``load_config``.
        texts: Settings as on a command line; ``None`` switches a bool on.

    Returns:
        The experiment, and the value that each text stands for.

    Raises:
        ConfigError: As ``experiment_of``, and if a text is no value of its setting.
    """
    values = _settings_of(config)
    read = values_of_texts(values, texts)
    return experiment_of(values, read), read


def values_of_texts(config: Config, texts: Mapping[str, str | None]) -> dict[str, Any]:
    """Returns the value that each text stands for, by dotted name, without further checks.

    Args:
        config: See ``load_config``; it selects the settings that exist.
        texts: See ``experiment_of_texts``.

    Raises:
        ConfigError: If a setting does not exist, or a text is no value of its setting.
    """
    read: dict[str, Any] = {}

    def reading(name: str, hint: Any, text: str | None) -> Any:
        return read.setdefault(name, read_text(name, hint, text))

    override(Experiment, _settings_of(config), texts, reading)
    return read


def read_text(name: str, hint: Any, text: str | None) -> Any:
    """Returns the value of the flag ``--config.NAME=TEXT`` of type ``hint``.

    Raises:
        ConfigError: If the text is no value of this type.
    """
    if text is None and bool not in (hint, *typing.get_args(hint)):
        raise ConfigError(f"Missing value for flag --config.{name}: add =VALUE")
    try:
        return from_text(hint, "true" if text is None else text)
    except ValueError as error:
        raise ConfigError(f"flag --config.{name}={text}: {plain(line_of(error))}") from error


def _settings_of(config: Config) -> ConfigDict:
    if isinstance(config, Experiment):
        return settings(config)
    if isinstance(config, ConfigDict):
        return copy.deepcopy(config)
    name, colon, argument = str(config).partition(":")
    file = config_file(name)
    values = _result_of(file, [argument] if colon else [])
    if not isinstance(values, ConfigDict):
        kind = type(values).__name__
        raise ConfigError(
            f"get_config() of {file} returns {kind}, not a ConfigDict: return a ConfigDict"
        )
    return values


def _result_of(file: Path, arguments: list[str]) -> Any:
    """Returns the result of the function ``get_config`` of a file."""
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
