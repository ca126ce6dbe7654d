"""Every number of a setting has a range, and no value of any setting does anything but run or fail.

The cases are generated from the schema: every field of every part, and every choice of every
published router.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import typing
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np
import pytest

from moe_jax import ranges, routing
from moe_jax.config.experiment import Experiment
from moe_jax.config.expert_rates import ExpertRates
from moe_jax.config.optimizer import Adafactor, AdamW, OptimizerConfig
from moe_jax.config.schedules import Cosine, Linear
from moe_jax.config.schema import _chosen_by_type, _options, build, describe, type_hints
from moe_jax.config.setting_schedules import SettingSchedule
from moe_jax.data import DataConfig, PartConfig, Spans
from moe_jax.decoding import Sampling
from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig, EncoderDecoderConfig
from moe_jax.models.config import AttentionOverride
from moe_jax.nn.adapted import LoRA
from moe_jax.nn.attention import Details
from moe_jax.nn.moe_config import LayerOverride, MoEConfig
from moe_jax.nn.norm import NormConfig
from moe_jax.nn.positions import Rotary
from moe_jax.nn.shared import SharedConfig
from moe_jax.parallel import MeshConfig
from moe_jax.parallel.mesh import make_mesh
from moe_jax.planning.compile import batch_shapes, make_step
from moe_jax.ranges import Range, ranges_of
from moe_jax.routing import LoadBalance, ZLoss
from moe_jax.routing.select import Limit
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import Recipe
from moe_jax.training.step import Objective, jit_train_step
from tests.matrix import sample

ROUTER = dataclasses.replace(routing.preset("switch"), balance=())
MOE = MoEConfig(
    every=1, num_experts=8, expert_dim=8, group_size=16, router=ROUTER, allow_future_leak=True
)
SIZES = {"width": 8, "num_heads": 2, "head_dim": 4, "mlp_dim": 8, "scan_layers": False}
DATA = DataConfig(source="mixture", tokenizer="bytes", seq_length=16, batch_size=2)
TINY = Experiment(
    "tiny", DecoderConfig(num_layers=1, moe=MOE, **SIZES), DATA, mesh=MeshConfig(data=1)
)
PAIR = EncoderDecoderConfig(
    encoder_layers=1, decoder_layers=1, encoder_moe=MOE, decoder_moe=MOE, **SIZES
)
RESTORING = {
    "model": {"type": "EncoderDecoderConfig", **describe(PAIR)},
    "data": describe(dataclasses.replace(DATA, spans=Spans(sentinels=10), target_length=16)),
}

# A part that has no defaults, or whose defaults turn it off.
EXAMPLES = {
    EncoderDecoderConfig: PAIR,
    Limit: Limit(2, 1),
    PartConfig: PartConfig("mixture"),
    LayerOverride: LayerOverride((0,)),
    ExpertRates: ExpertRates("surge", noise_tokens=8.0),
    LoRA: LoRA(groups=("attention",)),
    SettingSchedule: SettingSchedule("z_loss", (1,), (0.5,)),
    AttentionOverride: AttentionOverride(every=1),
    SharedConfig: SharedConfig(hidden=8, mix="conditional"),
    Spans: Spans(sentinels=10),
}
# The parts that another part needs beside itself.
COMPANIONS = {
    "EncoderDecoderConfig": RESTORING,
    "Spans": RESTORING,
    "SecondBalance": {"model.moe.router.select": {"type": "Top2"}},
}


@dataclasses.dataclass(frozen=True)
class Place:
    """A setting, and an experiment, as plain values, whose part has it."""

    path: tuple[str | int, ...]
    hint: Any
    experiment: dict[str, Any]

    @property
    def name(self) -> str:
        """The setting as messages have it."""
        steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.path)
        return "config" + "".join(steps)

    def holding(self, value: Any) -> dict[str, Any]:
        """Returns the experiment with the setting changed."""
        return changed(self.experiment, self.path, value)


def changed(experiment: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    new = copy.deepcopy(experiment)
    group = functools.reduce(lambda inner, step: inner[step], path[:-1], new)
    group[path[-1]] = value
    return new


def places(
    cls: type, path: tuple[str | int, ...], experiment: dict[str, Any], seen: set[type]
) -> Iterator[Place]:
    """Yields the settings of ``cls``, which is at ``path``, and of the parts that it may hold."""
    seen.add(cls)
    # A router is met in the feed-forward layers, where it is in use, before it is met elsewhere.
    later = ("attention_experts", "overrides")
    for field in sorted(dataclasses.fields(cls), key=lambda field: field.name in later):
        hint, here = type_hints(cls)[field.name], (*path, field.name)
        if not _options(hint):
            yield Place(here, ranges.declared(cls)[field.name], experiment)
        for part in _options(hint).values():
            if part not in seen:
                yield from places(part, *with_part(experiment, here, hint, part), seen)


def with_part(
    experiment: dict[str, Any], path: tuple[str | int, ...], hint: Any, part: type
) -> tuple[tuple[str | int, ...], dict[str, Any]]:
    """Returns the path of ``part`` and the experiment with it."""
    for name, value in COMPANIONS.get(part.__name__, {}).items():
        experiment = changed(experiment, tuple(name.split(".")), value)
    now = functools.reduce(lambda inner, step: inner[step], path, experiment)
    if (
        part not in EXAMPLES
        and isinstance(now, dict)
        and now.get("type", part.__name__) == (part.__name__)
    ):
        return path, experiment
    made = EXAMPLES[part] if part in EXAMPLES else part()
    value = {"type": part.__name__, **describe(made)} if _chosen_by_type(hint) else describe(made)
    if typing.get_origin(hint) is tuple:
        return (*path, 0), changed(experiment, path, [value])
    return path, changed(experiment, path, value)


def preset_places() -> Iterator[Place]:
    """Yields the choices of the published routers."""
    plain = describe(TINY)
    for function in routing.PRESETS:
        for choice, hint in ranges.declared(function).items():
            router = {"preset": function.__name__}
            experiment = changed(plain, ("model", "moe", "router"), router)
            yield Place(("model", "moe", "router", choice), hint, experiment)


SCHEMA = [*places(Experiment, (), describe(TINY), set())]
CHOICES = [*preset_places()]
PLACES = SCHEMA + CHOICES


def number_of(hint: Any) -> type | None:
    """Returns ``int`` or ``float`` if the setting is such a number, or a list of them."""
    if typing.get_origin(hint) is Literal:
        return None
    kinds = [number_of(inner) for inner in typing.get_args(hint)]
    return next((kind for kind in (hint, *kinds) if kind in (int, float)), None)


def is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple


NUMBERS = [place for place in PLACES if number_of(place.hint)]


def test_the_schema_is_walked_to_its_ends():
    found = {place.name.removeprefix("config.") for place in SCHEMA}
    deep = {"optimizer.rule.b1", "optimizer.rule.decay_rate", "model.positions.scaling.beta_fast"}
    deep |= {"model.moe.router.balance[0].ema", "model.moe.overrides[0].num_experts"}
    deep |= {"data.spans.noise_density", "model.encoder_layers", "mesh.data"}
    deep |= {"model.moe.router.select.rank.rate", "model.moe.router.select.limit.keep"}
    assert deep <= found
    assert len(NUMBERS) > 200


@pytest.mark.parametrize("place", NUMBERS, ids=lambda place: place.name)
def test_every_number_declares_a_range(place: Place):
    (allowed,) = ranges_of(place.hint)
    assert math.isfinite(allowed.low) and math.isfinite(allowed.high)


def test_samples_and_presets_declare_ranges_too():
    hints = [*ranges.declared(Sampling).values()]
    for function in routing.PRESETS:
        hints += ranges.declared(function).values()
    assert all(ranges_of(hint) for hint in hints if number_of(hint))


# ---------------------------------------------------------------- values that are refused

NONSENSE = (math.nan, math.inf, -math.inf, 10**18, 1e300, -(10**18), "seven", "", True, {}, [None])


@pytest.mark.parametrize("place", NUMBERS, ids=lambda place: place.name)
def test_no_number_is_nonsense(place: Place):
    for value in NONSENSE:
        value = [value] if is_list(place.hint) else value
        with pytest.raises(ConfigError) as error:
            build(Experiment, place.holding(value))
        message = str(error.value)
        assert "\n" not in message and message.startswith(place.name), message


@pytest.mark.parametrize("place", NUMBERS, ids=lambda place: place.name)
def test_a_number_outside_its_range_is_named_with_it(place: Place):
    (allowed,) = ranges_of(place.hint)
    kind = number_of(place.hint)
    for value in {-1, 0, allowed.low - 1, allowed.high + 1}:
        if value not in allowed:
            value, hint = kind(value), place.hint
            while is_list(hint):
                value, hint = [value], typing.get_args(hint)[0]
            with pytest.raises(ConfigError) as error:
                build(Experiment, place.holding(value))
            message = str(error.value)
            assert message.startswith(place.name) and str(allowed) in message, message


OTHERS = [place for place in PLACES if not number_of(place.hint)]


@pytest.mark.parametrize("place", OTHERS, ids=lambda place: place.name)
def test_a_setting_that_is_no_number_takes_none(place: Place):
    for value in (math.nan, -1, {}, [0]):
        with pytest.raises(ConfigError) as error:
            build(Experiment, place.holding(value))
        assert "\n" not in str(error.value) and str(error.value).startswith(place.name)


# ---------------------------------------------------------------- values that are accepted


@functools.cache
def abstract_step(experiment: Experiment) -> None:
    """Traces the first state and one step, without memory and without compiling."""
    step = make_step(experiment, make_mesh(experiment.mesh, jax.devices()[:1]))
    with jax.set_mesh(step.mesh):
        step.function.eval_shape(step.state, step.batch)


def program_of(experiment: Experiment) -> Experiment:
    """Returns the experiment with all that no program depends on as it is by default."""
    data = dataclasses.replace(
        DATA,
        seq_length=experiment.data.seq_length,
        target_length=experiment.data.target_length,
        batch_size=experiment.data.batch_size,
        spans=experiment.data.spans,
    )
    kept = {
        name: getattr(experiment.training, name)
        for name in ("microbatches", "loss_chunk", "z_loss", "lookahead_weight", "record_routing")
    }
    training = dataclasses.replace(TINY.training, **kept)
    return dataclasses.replace(experiment, name="x", data=data, training=training)


def outcome(values: dict[str, Any]) -> str:
    """Returns the line of a refusal, or nothing if a step can be traced."""
    try:
        experiment = build(Experiment, values)
        experiment.check(1)
    except (ConfigError, ValueError, FileNotFoundError) as error:
        assert "\n" not in str(error)
        return str(error)
    abstract_step(program_of(experiment))
    return ""


def edges(place: Place) -> list[Any]:
    """Returns the least numbers that a setting accepts, and -1 and 0 where it does."""
    (allowed,) = ranges_of(place.hint)
    found = {value for value in (-1, 0, allowed.low, *allowed.also) if value in allowed}
    values = [number_of(place.hint)(value) for value in sorted(found)]
    return [[value] for value in values] if is_list(place.hint) else values


@pytest.mark.parametrize("place", sample(SCHEMA, part=6), ids=lambda place: place.name)
def test_the_least_number_is_refused_in_a_line_or_a_step_is_traced(place: Place):
    if number_of(place.hint):
        for value in edges(place):
            outcome(place.holding(value))
    elif str(place.hint) == "<class 'str'>":
        outcome(place.holding(""))


# ---------------------------------------------------------------- the ends of ranges, computed


def at_end(part: Any, end: str) -> Any:
    """Returns a part whose ``float`` settings are all at the low or high end of their ranges."""
    hints = ranges.declared(type(part))
    ends = {
        field.name: end_of(*ranges_of(hints[field.name]), end)
        for field in dataclasses.fields(part)
        if number_of(hints[field.name]) is float
    }
    return dataclasses.replace(part, **ends)


def end_of(allowed: Range, end: str) -> float:
    """Returns the least or largest float32 in a range, of those that are not subnormal."""
    if end == "high":
        return float(np.nextafter(np.float32(allowed.high), np.float32(0)))
    if not allowed.above:
        return float(allowed.low)
    after = np.nextafter(np.float32(allowed.low), np.float32(np.inf))
    return float(max(after, np.finfo(np.float32).tiny * 2))


def stepped(experiment: Experiment) -> tuple[Any, Any]:
    """Returns the parameters after one real step on two random texts, and the report."""
    mesh = make_mesh(experiment.mesh, jax.devices()[:1])
    optimizer = make_optimizer(experiment.optimizer, 10)
    recipe = Recipe(experiment.model, experiment.vocab_size, optimizer, 0, mesh)
    graph, state = recipe.create()
    function = jit_train_step(graph, optimizer, Objective.of(experiment), state)
    shapes = batch_shapes(experiment.model, 2, 16, 0)
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(1, 200, shape, np.int32) for name, shape in shapes.items()}
    batch["segments"] = np.ones((2, 16), np.int32)
    batch["positions"] = np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16))
    with jax.set_mesh(mesh):
        state, report = function(state, batch)
    return jax.device_get(state.params), report


def assert_finite(params: Any) -> None:
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("end", ["low", "high"])
@pytest.mark.parametrize(
    "optimizer",
    [OptimizerConfig(AdamW(), Cosine()), OptimizerConfig(Adafactor(), Linear())],
    ids=["adamw", "adafactor"],
)
def test_an_optimizer_at_the_ends_of_its_ranges_keeps_parameters_finite(optimizer, end):
    parts = {"rule": at_end(optimizer.rule, end), "schedule": at_end(optimizer.schedule, end)}
    extreme = dataclasses.replace(at_end(optimizer, end), **parts)
    params, report = stepped(dataclasses.replace(TINY, optimizer=extreme))
    assert report.updated
    assert_finite(params)


@pytest.mark.parametrize("end", ["low", "high"])
def test_a_model_at_the_ends_of_its_ranges_keeps_parameters_finite(end):
    router = dataclasses.replace(
        at_end(ROUTER, end),
        balance=(at_end(LoadBalance(), end), at_end(ZLoss(), end)),
        capacity=at_end(ROUTER.capacity, end),
    )
    shared = at_end(SharedConfig(hidden=8, mix="conditional"), end)
    model = dataclasses.replace(
        at_end(TINY.model, end),
        norm=at_end(NormConfig(), end),
        positions=at_end(Rotary(), end),
        attention=at_end(Details(qk_norm="head"), end),
        moe=dataclasses.replace(at_end(MOE, end), router=router, shared=shared),
    )
    training = at_end(TINY.training, end)
    assert_finite(stepped(dataclasses.replace(TINY, model=model, training=training))[0])
