"""The checkpoint with the lowest validation loss of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from moe_jax.errors import ConfigError
from moe_jax.run import workdir
from moe_jax.training.metrics import read_metrics
from moe_jax.training.step_folders import steps_of
from moe_jax.training.validations import Validations

# Step of a checkpoint; ``best`` for the lowest validation loss, ``None`` for the newest intact one.
Step: TypeAlias = int | Literal["best"] | None


def step_of(folder: Path, step: Step) -> int | None:
    """Returns the number of a step, or ``None`` for the newest intact checkpoint.

    The losses are those of ``metrics.jsonl``.

    Args:
        folder: Workdir of the run.
        step: Step as the user gives it.

    Raises:
        ConfigError: If the best step is wanted, and the run has no validation yet or did not keep
            the checkpoint.
    """
    if step != "best":
        return step
    best = Validations().after_all(read_metrics(folder)).best
    kept = sorted(steps_of(folder / workdir.CHECKPOINTS))
    if not best:
        raise ConfigError(f"{folder} has no validation yet, so no step is best: train further")
    if best not in kept:
        raise ConfigError(
            f"step {best} has the lowest validation loss in {folder}, and its checkpoint is not "
            "kept: train with training.keep_best=True, or choose a --step of "
            f"{', '.join(map(str, kept))}"
        )
    return best
