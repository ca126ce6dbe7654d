"""What every config starts from: each setting with its default, so that each can be overridden."""

from ml_collections import ConfigDict

from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import settings, type_hints, unset
from moe_jax.models import DecoderConfig, ModelConfig
from moe_jax.routing import PRESETS


def router(preset: str, **choices: float | int | str | bool) -> ConfigDict:
    """Returns a published router; a choice left unset is the preset's own.

    The choices of every preset are there, so that both preset and choices can be overridden.
    """
    config = ConfigDict({"preset": preset})
    for function in PRESETS:
        for name, hint in type_hints(function).items():
            if name != "return":
                config[name] = unset(hint)
    config.update(choices)
    return config


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
