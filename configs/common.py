"""What every config starts from: the settings in force, each with its default."""

from ml_collections import ConfigDict

from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import settings
from moe_jax.models import DecoderConfig, ModelConfig


def router(preset: str, **choices: float | int | str | bool) -> ConfigDict:
    """Returns a published router; a choice that is not given is the preset's own."""
    return ConfigDict({"preset": preset, **choices})


def base(name: str, model: ModelConfig | None = None) -> ConfigDict:
    """Returns the defaults of ``Experiment``; replace ``model.moe.router`` by a preset."""
    config = settings(Experiment(name=name, model=model or DecoderConfig()))
    config.model.attention_experts.router = router("switch")
    return config


def part(kind: str, **choices: float | int | str | bool) -> ConfigDict:
    """Returns a part that may be of several types, by the name of its type."""
    return ConfigDict({"type": kind, **choices})


def adafactor(config: ConfigDict, learning_rate: float, warmup: int = 10_000) -> None:
    """Sets the recipe of T5, GShard, Switch and GLaM: Adafactor, constant and then rsqrt."""
    config.optimizer.rule = part("Adafactor")
    config.optimizer.schedule = part("RSqrt")
    config.optimizer.warmup_steps = warmup
    config.optimizer.learning_rate = learning_rate / warmup**0.5
