"""What every config starts from: each setting with its default, so that each can be overridden."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from moe_jax.build import describe
from moe_jax.experiment import Experiment


def base(name: str) -> ConfigDict:
    """Returns the defaults of ``Experiment``; replace ``model.moe.router`` by a preset."""
    config = ConfigDict(describe(Experiment(name=name)), convert_dict=True)
    config.data.data_dir = placeholder(str)
    config.data.eval_documents = placeholder(int)
    return config
