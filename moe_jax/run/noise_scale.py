"""A measurement of the gradient noise scale (McCandlish et al. 2018, 1812.06162) in a short run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax import files
from moe_jax.config.experiment import Experiment
from moe_jax.config.schedules import Constant
from moe_jax.errors import ConfigError
from moe_jax.run.trial import trial
from moe_jax.training.noise import Estimates, estimates

RESULT = "noise_scale.json"
_PARTS, _FEWEST = 5, 10


def measuring(experiment: Experiment, steps: int) -> Experiment:
    """Returns the experiment of a measurement, which writes the estimates of every step.

    The learning rate stays at its peak after a warm-up of at most half of the steps. A run without
    microbatches gets two.

    Args:
        experiment: Experiment whose noise scale is wanted.
        steps: Number of steps of the measurement.
    """
    optimizer = dataclasses.replace(
        experiment.optimizer,
        schedule=Constant(),
        warmup_steps=min(experiment.optimizer.warmup_steps, steps // 2),
    )
    microbatches = max(experiment.training.microbatches, 2)
    return trial(experiment, steps, optimizer, noise_scale=True, microbatches=microbatches)


@dataclasses.dataclass(frozen=True)
class NoiseScale:
    """The gradient noise scale of a short run.

    Attributes:
        found: Estimates of all steps.
        rows: Number of sequences in a batch.
    """

    found: Estimates
    rows: int

    @property
    def settled(self) -> Estimates:
        """Estimates of the second half of the steps, which the result is the average of."""
        return self.found[len(self.found.steps) // 2 :]

    @property
    def tokens(self) -> float:
        """Noise scale in tokens, the suggested size of a batch."""
        return self.settled.scale

    @property
    def interval(self) -> tuple[float, float]:
        """Interval of the noise scale in tokens, of probability 0.9."""
        return self.settled.interval()

    @property
    def sequences(self) -> int:
        """Suggested size of a batch in sequences: the power of two nearest to the noise scale."""
        of_row = self.settled.tokens.mean() / self.rows
        return int(2 ** max(round(math.log2(self.tokens / of_row)), 0))


def measurement(records: Iterable[Mapping[str, Any]], rows: int) -> NoiseScale:
    """Returns the noise scale from the metrics of a measurement.

    Args:
        records: Records of ``metrics.jsonl``.
        rows: Number of sequences in a batch.

    Raises:
        ConfigError: If the run has too few estimates, or its mean gradient is not above the noise.
    """
    found = NoiseScale(estimates(records), rows)
    count = len(found.found.steps)
    if count < _FEWEST:
        raise ConfigError(
            f"{count} steps have an estimate of the gradient noise, and {_FEWEST} are needed: "
            "raise --steps"
        )
    if not math.isfinite(found.tokens) or found.tokens <= 0:
        raise ConfigError(
            "the mean gradient is not above its noise: raise --steps or "
            "--config.data.batch_size, or lower --config.optimizer.learning_rate"
        )
    return found


def write_measurement(measured: NoiseScale, folder: Path) -> None:
    """Writes ``noise_scale.json`` into a workdir; an infinite upper end is null."""
    low, high = measured.interval
    result = {
        "tokens": measured.tokens,
        "interval": [low, high if math.isfinite(high) else None],
        "sequences": measured.sequences,
        "squared_gradient": float(measured.settled.squared_gradient.mean()),
        "trace": float(measured.settled.trace.mean()),
        "first_step": int(measured.settled.steps[0]),
        "last_step": int(measured.settled.steps[-1]),
    }
    with files.replaced(folder / RESULT) as temporary:
        temporary.write_text(json.dumps(result) + "\n")


def table(measured: NoiseScale) -> str:
    """Returns the noise scale over the run, its interval and the suggestion, as lines of text."""
    parts = np.array_split(np.arange(len(measured.found.steps)), _PARTS)
    low, high = measured.interval
    first, last = measured.settled.steps[[0, -1]].astype(int)
    return "\n".join(
        [
            f"{'steps':>13} {'|G|^2':>10} {'tr(S)':>10} {'tokens':>12}",
            *(_row(measured.found[part[0] : part[-1] + 1]) for part in parts),
            f"noise scale: {measured.tokens:,.0f} tokens, 90% interval {low:,.0f} to {high:,.0f}, "
            f"from steps {first} to {last}",
            f"suggestion: batches of {measured.tokens:,.0f} tokens, "
            f"--config.data.batch_size={measured.sequences}",
        ]
    )


def _row(part: Estimates) -> str:
    steps = f"{part.steps[0]:.0f} to {part.steps[-1]:.0f}"
    squared, trace = part.squared_gradient.mean(), part.trace.mean()
    return f"{steps:>13} {squared:10.3g} {trace:10.3g} {part.scale:12,.0f}"
