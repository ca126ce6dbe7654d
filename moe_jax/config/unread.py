"""Settings without effect, which no part of a run reads because of its other settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from moe_jax.config.experiment import Experiment
from moe_jax.data import BLEND, DataConfig, PartConfig
from moe_jax.models import ModelConfig
from moe_jax.nn.attention import Details
from moe_jax.nn.latent import Latent
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.positions import Rotary
from moe_jax.nn.shared import SharedConfig
from moe_jax.routing import Hash, Router

_SHARES = ("factor", "eval_factor", "eval_fraction", "minimum", "multiple", "rounding")


def unread(experiment: Experiment) -> list[str]:
    """Returns one line for each changed setting that has no effect."""
    lines = (
        *_of_training(experiment),
        *_of_optimizer(experiment),
        *_of_data(experiment),
        *_of_model(experiment.model),
        *_of_layers(experiment.model),
    )
    return list(dict.fromkeys(lines))


def _changed(part: Any, names: Iterable[str], where: str, reason: str) -> Iterator[str]:
    """Yields a line for each of the settings ``names`` of ``part`` that is not its default."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.name in names and value != field.default:
            yield f"{where}.{field.name}={value!r} has no effect: {reason}"


def _of_training(experiment: Experiment) -> Iterator[str]:
    training, where = experiment.training, "training"
    if not training.start_from:
        yield from _changed(training, ["start_with"], where, "training.start_from is not set")
    if not training.teacher:
        settings = ["teacher_weight", "teacher_temperature", "routing_weight", "routing_groups"]
        yield from _changed(training, settings, where, "training.teacher is not set")
    if not getattr(experiment.model, "lookahead", 0):
        yield from _changed(training, ["lookahead_weight"], where, "the model does not look ahead")
    if not experiment.moe_layers:
        yield from _changed(training, ["record_routing"], where, "no layer has experts")
    elif not training.routing_weight:
        reason = "training.routing_weight is 0"
        yield from _changed(training, ["routing_groups"], where, reason)
    if training.teacher and not (training.teacher_weight or training.routing_weight):
        yield "training.teacher has no effect: training.teacher_weight is 0"
    if training.eval_every > training.steps:
        reason = f"the run ends after training.steps={training.steps}, and is evaluated then"
        yield from _changed(training, ["eval_every"], where, reason)
    if not training.eval_every:
        reason = "training.eval_every is 0, so the run is validated only at its end"
        yield from _changed(training, ["keep_best", "patience"], where, reason)
        for alarm in training.alarms:
            if alarm.kind == "eval" and not getattr(alarm, "reference", ""):
                yield f"training.alarms: {type(alarm).__name__} has no effect: {reason}"
    if training.keep_every % training.checkpoint_every:
        yield (
            f"training.keep_every={training.keep_every} is not a multiple of training."
            f"checkpoint_every={training.checkpoint_every}: only steps that are multiples of both "
            "are kept"
        )


def _of_optimizer(experiment: Experiment) -> Iterator[str]:
    optimizer, steps = experiment.optimizer, experiment.training.steps
    if optimizer.warmup_steps > steps:
        yield (
            f"optimizer.warmup_steps={optimizer.warmup_steps} is beyond training.steps={steps}: "
            "the learning rate never reaches its peak"
        )
    if not experiment.moe_layers:
        names = ("expert_multiplier", "router_multiplier", "decay_routers")
        yield from _changed(optimizer, names, "optimizer", "no layer has experts")
    if not getattr(optimizer.rule, "weight_decay", 0):
        decays, reason = ("decay_routers", "decay_embeddings"), "the rule has no weight decay"
        yield from _changed(optimizer, decays, "optimizer", reason)


def _of_data(experiment: Experiment) -> Iterator[str]:
    yield from _of_blend(experiment.data)
    for name, part in experiment.data.parts.items():
        where = f"data.blend.parts[{name!r}]" if name else "data"
        yield from _of_source(part, where)
    config = experiment.data
    if not any(part.source == "mixture" for part in config.parts.values()):
        names = [field.name for field in dataclasses.fields(config.mixture)]
        reason = f"data.source={config.source!r} is not 'mixture'"
        yield from _changed(config.mixture, names, "data.mixture", reason)
    if config.source == "mixture" and config.tokenizer != "sentencepiece":
        reason = "neither the source nor the tokenizer uses this folder"
        yield from _changed(config, ["data_dir"], "data", reason)


def _of_blend(config: DataConfig) -> Iterator[str]:
    names: Sequence[str]
    if config.source == BLEND:
        own = {field.name for field in dataclasses.fields(PartConfig)} - {"source"}
        yield from _changed(config, own, "data", "each part of data.blend has its own")
    else:
        reason = f"data.source={config.source!r} is not 'blend'"
        yield from _changed(config.blend, ("parts", "temperature"), "data.blend", reason)
    if any(part.weight is not None for part in config.blend.parts):
        names, reason = ["temperature"], "the parts have weights"
        yield from _changed(config.blend, names, "data.blend", reason)


def _of_source(config: DataConfig, where: str) -> Iterator[str]:
    names: Sequence[str]
    files = config.source.startswith("files:")
    takes_from_training = config.source.startswith("hf:") and not config.eval_split
    if not files and not takes_from_training:
        reason = f"{where}.source={config.source!r} has splits of its own"
        yield from _changed(config, ["eval_one_in"], where, reason)
    elif config.eval_source:
        yield from _changed(config, ["eval_one_in"], where, f"{where}.eval_source is set")
    if (files or config.source == "mixture") and not config.eval_source:
        names = ("train_split", "eval_split")
        reason = f"{where}.source={config.source!r} has splits of its own"
        yield from _changed(config, names, where, reason)
    if config.source == "mixture" and not config.eval_source:
        reason = f"{where}.source={config.source!r} has no fields"
        yield from _changed(config, ["text_feature"], where, reason)


def _of_model(model: ModelConfig) -> Iterator[str]:
    names: Sequence[str]
    latent, rotary = isinstance(model.attention, Latent), isinstance(model.positions, Rotary)
    if latent:
        names, reason = ("num_kv_heads", "head_dim"), "latent attention has sizes of its own"
        yield from _changed(model, names, "model", reason)
    experts = model.attention_experts
    if not experts.every and not experts.layers:
        names = [f.name for f in dataclasses.fields(experts) if f.name not in ("every", "router")]
        yield from _changed(
            experts, names, "model.attention_experts", "its every and layers are not set"
        )
    if not model.gated and not any(moe.gated for _, moe in _mixtures(model)):
        reason = "no network of the model is gated"
        yield from _changed(model, ("mlp_limit", "mlp_up_offset"), "model", reason)
    yield from _of_details(model.attention, "model.attention", rotary)
    for i, other in enumerate(model.attention_overrides):
        where = f"model.attention_overrides[{i}]"
        yield from _of_details(other.details, f"{where}.details", rotary or bool(other.positions))
        if not rotary and other.positions is None:
            yield from _changed(other, ["rotary"], where, "the model has no rotary positions")


def _of_details(details: Details | Latent, where: str, rotary: bool) -> Iterator[str]:
    if not isinstance(details, Details):
        return
    if not details.temperature:
        yield from _changed(details, ["temperature_length"], where, "its temperature is 0")
    if details.qk_norm == "unit" and not rotary:
        reason = "the norm comes after a rotation, and the model has no rotary positions"
        yield from _changed(details, ["qk_norm"], where, reason)


def _mixtures(model: ModelConfig) -> list[tuple[str, MoEConfig]]:
    names = ("moe", "encoder_moe", "decoder_moe")
    return [(f"model.{name}", getattr(model, name)) for name in names if hasattr(model, name)]


def _of_layers(model: ModelConfig) -> Iterator[str]:
    for where, moe in _mixtures(model):
        if moe.layers:
            yield from _changed(moe, ["every", "last"], where, f"{where}.layers is set")
        elif not moe.every:
            yield from _changed(moe, ["overrides", "last"], where, f"{where}.every is 0")
        if moe.expert_dims:
            yield from _changed(moe, ["expert_dim"], where, f"{where}.expert_dims is set")
        if model.norm.place == "output":
            reason = "model.norm.place='output' leaves the inputs of layers as they are"
            yield from _changed(moe, ["router_input"], where, reason)
        yield from _of_shared(moe.shared, f"{where}.shared")
    for layer in model.sparse_layers():
        yield from _of_router(layer.moe.router, f"model.{layer.setting}.router")


def _of_shared(shared: SharedConfig, where: str) -> Iterator[str]:
    names = ("mix", "norms", "gate_drop", "gate_target", "gate_weight")
    if not shared.hidden:
        yield from _changed(shared, names, where, f"{where}.hidden is 0")
    elif not shared.gate_weight:
        yield from _changed(shared, ["gate_target"], where, f"{where}.gate_weight is 0")


def _of_router(router: Router, where: str) -> Iterator[str]:
    capacity = router.capacity
    names: Sequence[str]
    if capacity.dropless == "always":
        reason = "dropless='always' gives a slot to every token"
        yield from _changed(capacity, (*_SHARES, "per_choice"), f"{where}.capacity", reason)
    elif capacity.dropless == "eval":
        reason = "dropless='eval' gives a slot to every token in evaluation"
        names = ("eval_factor", "eval_fraction")
        yield from _changed(capacity, names, f"{where}.capacity", reason)
    if isinstance(router.select, Hash):
        kind = router.select.kind
        names = [name for name, of in (("seed", "random"),) if kind != of]
        yield from _changed(router.select, names, f"{where}.select", f"its kind is {kind!r}")
