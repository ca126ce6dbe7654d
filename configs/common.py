"""What every config starts from: each setting with its default, so that each can be overridden."""

import typing

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from moe_jax.build import settings
from moe_jax.experiment import Experiment
from moe_jax.routing import PRESETS


def router(preset: str, **choices: float | int | str | bool) -> ConfigDict:
    """Returns a published router; a choice left unset is the preset's own.

    The choices of every preset are there, so that both preset and choices can be overridden.
    """
    config = ConfigDict({"preset": preset})
    for function in PRESETS:
        for name, hint in typing.get_type_hints(function).items():
            if name != "return":
                config[name] = placeholder(hint if isinstance(hint, type) else str)
    config.update(choices)
    return config


def base(name: str) -> ConfigDict:
    """Returns the defaults of ``Experiment``; replace ``model.moe.router`` by a preset."""
    return settings(Experiment(name=name))
