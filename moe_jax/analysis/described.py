"""Describes in words the settings of a run: model, router, capacity, data, optimizer, command."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_jax.config.experiment import Experiment
from moe_jax.config.optimizer import OptimizerConfig
from moe_jax.config.schema import build
from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig, EncoderDecoderConfig, ModelConfig
from moe_jax.models.config import SparseLayer
from moe_jax.routing import Router
from moe_jax.routing.capacity import Capacity

_ALWAYS = ("k", "weight")


def what_was_run(saved: Mapping[str, Any]) -> dict[str, str]:
    """Returns the names and values of a table that describes a run.

    Args:
        saved: Content of ``config.json``; a configuration that this version does not know, and a
            missing one, give only the command.
    """
    rows: dict[str, str] = {}
    try:
        experiment = build(Experiment, saved["config"])
    except (ConfigError, KeyError):
        experiment = None
    if experiment is not None:
        rows["model"] = _model(experiment.model)
        rows |= _routers(experiment.model)
        rows["data"] = _data(experiment, saved.get("corpus") or {})
        rows["optimizer"] = _optimizer(experiment.optimizer)
        rows["training"] = _training(experiment)
    if saved.get("command"):
        rows["command"] = saved["command"]
    return rows


def part(value: Any) -> str:
    """Returns a part of a configuration as its class with the settings that tell it from others.

    These are the settings that are no defaults, the number of choices and the weight of a loss.
    """
    fields = {field.name: field for field in dataclasses.fields(value)}
    found = {name: getattr(value, name) for name in fields}
    shown = {n: item for n, item in found.items() if n in _ALWAYS or item != _default(fields[n])}
    inner = ", ".join(f"{name} {_text(item)}" for name, item in shown.items())
    return type(value).__name__ + (f" ({inner})" if inner else "")


def _default(field: dataclasses.Field) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _text(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return part(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _model(model: DecoderConfig | EncoderDecoderConfig) -> str:
    if isinstance(model, EncoderDecoderConfig):
        stacks = f"encoder-decoder, {model.encoder_layers} and {model.decoder_layers}"
    else:
        stacks = f"decoder, {model.num_layers}"
    layers = model.sparse_layers()
    text = f"{stacks} layers of width {model.width}, {model.num_heads} heads"
    if not layers:
        return f"{text}, dense layers of width {model.mlp_dim}"
    names = ", ".join(str(layer.name) for layer in layers)
    return f"{text}, experts in layers {names}: {_distinct(map(_experts, layers))}"


def _experts(layer: SparseLayer) -> str:
    widths = sorted({*layer.moe.widths})
    text = f"{layer.moe.num_experts} experts of width {' and '.join(map(str, widths))}"
    latent = layer.moe.latent_dim
    return f"{text} in a latent space of width {latent}" if latent else text


def _routers(model: ModelConfig) -> dict[str, str]:
    routers = [layer.moe.router for layer in model.sparse_layers()]
    if not routers:
        return {}
    return {
        "router": _distinct(map(_router, routers)),
        "capacity": _distinct(_capacity(router.capacity) for router in routers),
    }


def _router(router: Router) -> str:
    parts = [f"score {part(router.score)}", f"select {part(router.select)}"]
    losses = ", ".join(map(part, router.balance)) or "none"
    return "; ".join([*parts, f"balance {losses}"])


def _capacity(capacity: Capacity) -> str:
    if capacity.dropless == "always":
        return "none: no token is dropped"
    evaluation = f"{capacity.eval_factor:g}"
    if capacity.eval_fraction:
        evaluation = f"{capacity.eval_fraction:g} of the tokens"
    if capacity.dropless == "eval":
        evaluation = "none"
    return f"factor {capacity.factor:g} in training, {evaluation} in evaluation"


def _data(experiment: Experiment, corpus: Mapping[str, Any]) -> str:
    config = experiment.data
    rows = f"{config.batch_size} rows of {config.seq_length:,} tokens per step"
    documents = f", {corpus['training']:,} documents" if "training" in corpus else ""
    return f"{config.source}{documents}; tokenizer {config.tokenizer}; {rows}"


def _optimizer(optimizer: OptimizerConfig) -> str:
    schedule = f"{part(optimizer.schedule)} after {optimizer.warmup_steps:,} steps of warmup"
    return f"{part(optimizer.rule)}, learning rate {optimizer.learning_rate:g}, {schedule}"


def _training(experiment: Experiment) -> str:
    steps = experiment.training.steps
    tokens = steps * experiment.tokens_per_step
    return f"{steps:,} steps, {tokens:,} tokens, seed {experiment.training.seed}"


def _distinct(texts: Any) -> str:
    return " or ".join(dict.fromkeys(texts))
