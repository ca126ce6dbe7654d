"""Schedules of frozen groups: arrays of a state that keep their values at some steps."""

from __future__ import annotations

import bisect
import collections
import dataclasses
from collections.abc import Collection, Sequence

from moe_jax.config.setting_schedules import SettingSchedule
from moe_jax.errors import ConfigError
from moe_jax.models import ModelConfig
from moe_jax.models.groups import leaves_in
from moe_jax.models.places import places

_SETTING = "training.schedules"


@dataclasses.dataclass(frozen=True)
class FrozenStage:
    """Groups of arrays that are frozen at the same steps.

    Attributes:
        schedule: Schedule whose value is 1 at the steps at which the arrays are frozen.
        groups: Names of the groups.
        leaves: Names of the leaves of a state that hold the arrays, such as
            ``params/embedding/table``.
    """

    schedule: SettingSchedule
    groups: tuple[str, ...]
    leaves: frozenset[str]

    def holds(self, step: int) -> bool:
        """Returns True if the arrays are frozen at a step, counted from 1."""
        last = bisect.bisect_right(self.schedule.steps, step) - 1
        return self.schedule.values[max(last, 0)] == 1

    def spans(self) -> str:
        """Returns the steps at which the arrays are frozen, such as ``steps 1 to 99``."""
        starts = (1, *(step for step in self.schedule.steps if step > 1))
        found: list[tuple[int, int | None]] = []
        for start, end in zip(starts, (*starts[1:], None), strict=True):
            if not self.holds(start):
                continue
            first = found.pop()[0] if found and found[-1][1] == start - 1 else start
            found.append((first, None if end is None else end - 1))
        return ", ".join(_span(first, last) for first, last in found)


def frozen_stages(
    schedules: Sequence[SettingSchedule], model: ModelConfig
) -> tuple[FrozenStage, ...]:
    """Returns the frozen groups of schedules; groups of the same steps and values are together.

    Args:
        schedules: Schedules of settings, of which those of other settings are left out.
        model: The model.

    Raises:
        ConfigError: If the model has no such group, or a scan holds an array of the groups in one
            leaf with another.
    """
    together = collections.defaultdict(list)
    for schedule in schedules:
        if schedule.group is not None:
            together[schedule.steps, schedule.values].append(schedule)
    stages = []
    for members in together.values():
        groups = tuple(schedule.group for schedule in members if schedule.group is not None)
        stages.append(FrozenStage(members[0], groups, leaves_in(model, groups, _SETTING)))
    return tuple(stages)


def _span(first: int, last: int | None) -> str:
    """Returns the words for the steps from ``first`` to ``last``, or to the end of the run."""
    if last is None:
        return f"from step {first} on"
    return f"step {first}" if first == last else f"steps {first} to {last}"


def check_stages(
    stages: Sequence[FrozenStage],
    model: ModelConfig,
    named: Collection[str],
    always: frozenset[str],
) -> None:
    """Rejects schedules of groups that are always frozen, and steps at which no parameter trains.

    Args:
        stages: Groups that are frozen at some steps.
        model: The model.
        named: Groups of ``optimizer.frozen``.
        always: Names of the leaves of a state that are frozen at all steps.

    Raises:
        ConfigError: If so.
    """
    for stage in stages:
        twice = [group for group in stage.groups if group in named]
        if twice or stage.leaves <= always:
            group = (twice or stage.groups)[0]
            cause = "model.lora" if model.lora is not None and not twice else "optimizer.frozen"
            raise ConfigError(
                f"{_SETTING} names frozen/{group}, but {cause} freezes {group} at all steps: leave "
                "it out of one of them"
            )
    trained = {place.leaf for place in places(model).values()} - always
    params = {leaf for leaf in trained if leaf.startswith("params/")}
    for step in sorted({1, *(step for stage in stages for step in stage.schedule.steps)}):
        if stages and params <= set().union(*(s.leaves for s in stages if s.holds(step))):
            raise ConfigError(
                f"{_SETTING} leaves no parameter to train at step {step}: leave one group out"
            )
