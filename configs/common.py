"""Functions that build configs: the defaults of all settings, routers and other parts."""

from ml_collections import ConfigDict

from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import settings
from moe_jax.models import DecoderConfig, EncoderDecoderConfig


def router(preset: str, **choices: float | int | str | bool) -> ConfigDict:
    """Returns the settings of a router preset; other choices keep their defaults."""
    return ConfigDict({"preset": preset, **choices})


def base(name: str, model: DecoderConfig | EncoderDecoderConfig | None = None) -> ConfigDict:
    """Returns the default settings of a run; set ``model.moe.router`` to a preset."""
    config = settings(Experiment(name=name, model=model or DecoderConfig()))
    config.model.attention_experts.router = router("switch")
    return config


def part(kind: str, **choices: float | int | str | bool) -> ConfigDict:
    """Returns the settings of a part that has several types, for the type ``kind``."""
    return ConfigDict({"type": kind, **choices})


def adafactor(config: ConfigDict, learning_rate: float, warmup: int = 10_000) -> None:
    """Sets Adafactor with an inverse square root schedule, as in T5, GShard, Switch and GLaM."""
    config.optimizer.rule = part("Adafactor")
    config.optimizer.schedule = part("RSqrt")
    config.optimizer.warmup_steps = warmup
    config.optimizer.learning_rate = learning_rate / warmup**0.5
