"""Changes of settings within a run: which settings may change, and what a change does."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax.numpy as jnp

from moe_jax.config.experiment import Experiment
from moe_jax.errors import ConfigError
from moe_jax.training.optimizer import learning_rate

# Values of settings, by dotted name: before and after a change.
Differences: TypeAlias = Mapping[str, tuple[Any, Any]]
# A change of another setting changes the arrays of the state, the data, or the model.
CHANGEABLE = (
    "training.steps",
    "training.patience",
    "optimizer.learning_rate",
    "optimizer.warmup_steps",
    "optimizer.schedule.",
    "optimizer.clip_norm",
    "optimizer.expert_multiplier",
    "optimizer.router_multiplier",
    "optimizer.rule.weight_decay",
)


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of settings within a run.

    Attributes:
        step: Step of the newest checkpoint; the next step is the first with the new settings.
        settings: Values before and after the change.
    """

    step: int
    settings: Differences

    def record(self) -> dict[str, Any]:
        """Returns the entry of ``config.json``: step, time and values of the settings."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        settings = {name: list(values) for name, values in self.settings.items()}
        return {"step": self.step, "time": now, "settings": settings}

    def lines(self, before: Experiment, after: Experiment) -> list[str]:
        """Returns the settings and the learning rates before and after, in words."""
        changed = [
            f"changed     {name}: {old} up to step {self.step}, {new} from now on"
            for name, (old, new) in self.settings.items()
        ]
        last, next_ = _rate(before, self.step), _rate(after, self.step + 1)
        schedule, steps = type(after.optimizer.schedule).__name__, after.training.steps
        return [
            *changed,
            f"schedule    {schedule} over all {steps} steps: learning rate {last:.3g} at step "
            f"{max(self.step, 1)} before the change, {next_:.3g} at step {self.step + 1}",
        ]


def _rate(experiment: Experiment, step: int) -> float:
    """Returns the learning rate at a step (from 1) of a run without skipped updates."""
    update = jnp.float32(max(step, 1) - 1)
    return float(learning_rate(experiment.optimizer, update, experiment.training.steps))


def check_changes(
    folder: Path, differences: Differences, *, allowed: bool | None, steps: int, done: int
) -> None:
    """Rejects a change of settings that the user did not ask for, or that a run cannot make.

    Args:
        folder: Workdir of the run.
        differences: Settings that differ from those of the run.
        allowed: True if the user asks for a change, by ``--change``; ``None`` if the command has no
            such flag.
        steps: New number of steps of the run.
        done: Step of the newest checkpoint, or 0.

    Raises:
        ConfigError: If so; the message lists the differences.
    """
    if not differences:
        return
    fixed = [name for name in differences if not name.startswith(CHANGEABLE)]
    if fixed or not allowed:
        listed = "; ".join(f"{k}: {old} there, {new} here" for k, (old, new) in differences.items())
        elsewhere = "use another --workdir"
        never = fixed or allowed is None
        remedy = f"{elsewhere}, or delete it" if never else f"add --change to go on, or {elsewhere}"
        raise ConfigError(f"{folder} holds a run of another configuration ({listed}): {remedy}")
    if steps <= done:
        raise ConfigError(
            f"{folder} is trained to step {done} already: set training.steps above {done}, or use "
            "another --workdir"
        )
