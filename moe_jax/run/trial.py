"""The settings of a short run that measures a setting and is thrown away."""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_jax.config.experiment import Experiment


def trial(experiment: Experiment, steps: int, optimizer: Any, **training: Any) -> Experiment:
    """Returns the experiment of a short run that logs every step and neither evaluates nor stops.

    Args:
        experiment: Experiment whose setting is wanted.
        steps: Number of steps of the short run.
        optimizer: Optimizer of the short run.
        **training: Further settings of ``training``.
    """
    short = dataclasses.replace(
        experiment.training,
        steps=steps,
        log_every=1,
        eval_every=0,
        checkpoint_every=steps,
        keep_every=0,
        keep_best=False,
        patience=0,
        alarms=(),
        **training,
    )
    return dataclasses.replace(experiment, optimizer=optimizer, training=short)
