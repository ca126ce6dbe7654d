"""What every config starts from: each setting with its default, so that each can be overridden."""

import inspect

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from moe_jax.build import describe
from moe_jax.experiment import Experiment
from moe_jax.routing import PRESETS


def router(preset: str, **choices: float | int | str | bool) -> ConfigDict:
    """Returns a published router with its choices, those not given at their defaults."""
    function = next(found for found in PRESETS if found.__name__ == preset)
    parameters = inspect.signature(function).parameters.items()
    defaults = {name: parameter.default for name, parameter in parameters}
    return ConfigDict({"preset": preset, **defaults, **choices})


def base(name: str) -> ConfigDict:
    """Returns the defaults of ``Experiment``; replace ``model.moe.router`` by a preset."""
    config = ConfigDict(describe(Experiment(name=name)), convert_dict=True)
    config.data.data_dir = placeholder(str)
    config.data.eval_documents = placeholder(int)
    return config
