"""Schedules of settings of routers, weights of losses and frozen groups, by the step."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.errors import ConfigError, nearest
from moe_jax.models import ModelConfig
from moe_jax.models.config import SparseLayer
from moe_jax.ranges import NonNegative, Positive, Ranged
from moe_jax.routing.changeable import changeable, range_of, weight_name

# The weights of losses that routers do not have, as ``training`` names them.
HEAD_Z, LOOKAHEAD = "z_loss", "lookahead_weight"
# A schedule of ``frozen/GROUP`` says at which steps a group of parameters is frozen.
FROZEN = "frozen/"


@dataclasses.dataclass(frozen=True)
class SettingSchedule(Ranged):
    """Schedule of one setting: its values at some steps, and the shape between these steps.

    The value before the first of the steps is the first value, and the value after the last of the
    steps is the last value.

    Attributes:
        setting: Setting of all MoE layers that read it: ``capacity_factor``, ``top_k``,
            ``input_jitter``, ``noise`` (V-MoE's standard deviation) or a weight of a loss by the
            loss's name, such as ``balance_weight`` and ``z_weight``; or ``z_loss`` or
            ``lookahead_weight`` of ``training``; or ``frozen/GROUP`` for a group of parameters as
            in ``optimizer.frozen``, with the values 1 (frozen) and 0 (trained) and the shape
            ``steps``. ``top_k`` is rounded to an integer.
        steps: Steps, counted from 1, in increasing order.
        values: Value of the setting at each of the steps.
        shape: Values between two of the steps: a straight line (``linear``), half a cosine
            (``cosine``), or the value of the earlier step (``steps``).
    """

    setting: str
    steps: tuple[Positive, ...]
    values: tuple[NonNegative, ...]
    shape: Literal["linear", "cosine", "steps"] = "linear"

    def __post_init__(self):
        """Raises ``ConfigError`` unless each of the increasing steps has a value in its range."""
        super().__post_init__()
        where = f"SettingSchedule({self.setting!r})"
        if not self.steps or len(self.steps) != len(self.values):
            raise ConfigError(
                f"{where} has {len(self.steps)} steps and {len(self.values)} values: give every "
                "step a value"
            )
        if any(a >= b for a, b in itertools.pairwise(self.steps)):
            raise ConfigError(f"{where}.steps={self.steps} must be steps in increasing order")
        for value in self.values:
            range_of(self.setting).check(value, f"{where}.values")
        if self.group is not None:
            self._check_frozen(where)

    def _check_frozen(self, where: str) -> None:
        for value in self.values:
            if value not in (0, 1):
                raise ConfigError(f"{where}.values={value!r} must be 1 (frozen) or 0 (trained)")
        if self.shape != "steps":
            raise ConfigError(
                f"{where}.shape={self.shape!r} must be 'steps', since a group is frozen or trained"
            )

    @property
    def group(self) -> str | None:
        """Name of the group of parameters that the schedule freezes, or ``None``."""
        name = self.setting
        return name.removeprefix(FROZEN) if name.startswith(FROZEN) else None

    def at(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """Returns the value at a step from 1, as float32 (``top_k`` and groups: int32)."""
        values = jnp.array(self.values, jnp.float32)
        if len(self.steps) == 1:
            value = values[0]
        else:
            value = self._between(step, jnp.array(self.steps, jnp.int32), values)
        whole = self.setting == "top_k" or self.group is not None
        return jnp.round(value).astype(jnp.int32) if whole else value

    def _between(
        self, step: Int[Array, ""], steps: Int[Array, " N"], values: Float[Array, " N"]
    ) -> Float[Array, ""]:
        last = jnp.searchsorted(steps, step, side="right") - 1
        if self.shape == "steps":
            return values[jnp.maximum(last, 0)]
        last = jnp.clip(last, 0, len(self.steps) - 2)
        done = (step - steps[last]) / (steps[last + 1] - steps[last])
        done = jnp.clip(done, 0.0, 1.0)
        if self.shape == "cosine":
            done = 0.5 - 0.5 * jnp.cos(jnp.pi * done)
        return values[last] * (1 - done) + values[last + 1] * done


def current(
    schedules: Sequence[SettingSchedule], step: Int[Array, ""]
) -> dict[str, Float[Array, ""]]:
    """Returns the value of each scheduled setting at a step, counted from 1, by name."""
    return {schedule.setting: schedule.at(step) for schedule in schedules}


def check_schedules(schedules: Sequence[SettingSchedule], model: ModelConfig) -> None:
    """Rejects schedules that the layers of a model cannot follow without another program.

    Schedules of frozen groups have further rules; see ``moe_jax.config.frozen_schedules``.

    Args:
        schedules: Schedules of settings.
        model: The model.

    Raises:
        ConfigError: If a setting has two schedules, if no layer reads it, or if it exceeds the
            value for which slots or choices are allocated.
    """
    named = collections.Counter(schedule.setting for schedule in schedules)
    for name, times in named.items():
        if times > 1:
            raise ConfigError(f"training.schedules has {times} schedules of {name}: give it one")
    if schedules:
        largest = _largest(model)
        for schedule in schedules:
            if schedule.group is None:
                _check(schedule, largest)


def _check(schedule: SettingSchedule, largest: Mapping[str, tuple[float, str]]) -> None:
    name = schedule.setting
    if name not in largest:
        raise ConfigError(
            f"training.schedules names {name!r}, which no layer of this model reads in training"
            f"{nearest(name, [*largest, f'{FROZEN}GROUP'])}"
        )
    bound, where = largest[name]
    most = max(schedule.values)
    if most > bound:
        raise ConfigError(
            f"training.schedules raises {name} to {most:g}, but model.{where}.router allocates "
            f"{bound:g}: give this router {name if name != 'top_k' else 'k'}={most:g}"
        )


def _largest(model: ModelConfig) -> dict[str, tuple[float, str]]:
    """Returns the largest value of each setting over the layers, and a layer that sets it."""
    largest = {HEAD_Z: (math.inf, "")}
    if getattr(model, "lookahead", 0):
        largest[LOOKAHEAD] = (math.inf, "")
    for layer in model.sparse_layers():
        for name, bound in _of_layer(layer).items():
            largest[name] = min(largest.get(name, (math.inf, "")), (bound, layer.setting))
    return largest


def _of_layer(layer: SparseLayer) -> dict[str, float]:
    """Returns the largest values of the settings that can change in an MoE layer."""
    shared = layer.moe.shared
    gated = shared.hidden and shared.mix == "conditional"
    weights = {weight_name("conditional_gate"): math.inf} if gated else {}
    return changeable(layer.moe.router) | weights
