"""A learning-rate range test (Smith, 1506.01186): the loss while the learning rate rises."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax import files
from moe_jax.config.experiment import Experiment
from moe_jax.config.schedules import ExponentialRise
from moe_jax.errors import ConfigError
from moe_jax.run.trial import trial

LINES, FIGURE = "lr_range.jsonl", "lr_range.png"
_ROWS, _MARGIN = 16, 10.0


def rising(experiment: Experiment, steps: int, first: float, last: float) -> Experiment:
    """Returns the experiment of a range test, whose learning rate rises exponentially.

    Args:
        experiment: Experiment whose learning rate is wanted.
        steps: Number of steps of the test.
        first: Learning rate of the first step.
        last: Learning rate of the last step.

    Raises:
        ConfigError: If the learning rate would not rise.
    """
    if not 0 < first < last:
        raise ConfigError(f"--first={first:g} must be above 0 and below --last={last:g}")
    optimizer = dataclasses.replace(
        experiment.optimizer,
        schedule=ExponentialRise(first / last),
        learning_rate=last,
        warmup_steps=0,
    )
    return trial(experiment, steps, optimizer)


@dataclasses.dataclass(frozen=True)
class RateCurve:
    """The losses of a range test.

    Attributes:
        rates: Learning rates ``(N,)``, increasing.
        losses: Training losses ``(N,)`` in nats per token.
        smoothed: Averages ``(N,)`` of each loss and its neighbours, a twentieth of the test in all.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray

    @property
    def lowest(self) -> int:
        """Index of the lowest smoothed loss."""
        return int(self.smoothed.argmin())

    @property
    def suggestion(self) -> float:
        """A tenth of the learning rate with the lowest smoothed loss."""
        return float(self.rates[self.lowest]) / _MARGIN


def rate_curve(records: Iterable[Mapping[str, Any]]) -> RateCurve:
    """Returns the losses of a range test from its metrics, up to the first that is not finite.

    Raises:
        ConfigError: If the lowest loss is at the first or at the last learning rate.
    """
    training = [record for record in records if record["kind"] == "train"]
    finite = list(itertools.takewhile(lambda record: record["loss"] is not None, training))
    rates, losses = (np.array([r[name] for r in finite]) for name in ("learning_rate", "loss"))
    curve = RateCurve(rates, losses, _smoothed(losses))
    if not len(rates) or curve.lowest == 0:
        raise ConfigError("the loss does not fall at any learning rate of the test: lower --first")
    if curve.lowest == len(rates) - 1:
        raise ConfigError(
            f"the loss still falls at the learning rate {rates[-1]:.3g}: raise --last"
        )
    return curve


def _smoothed(losses: np.ndarray) -> np.ndarray:
    """Returns the averages ``(N,)`` over windows around each loss; windows end with the losses."""
    reach = max(1, len(losses) // 40)
    windows = (losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses)))
    return np.array([window.mean() for window in windows])


def write_range(curve: RateCurve, folder: Path) -> None:
    """Writes ``lr_range.jsonl``, one line per step, and ``lr_range.png`` into a workdir."""
    names = ("learning_rate", "loss", "smoothed_loss")
    rows = zip(curve.rates, curve.losses, curve.smoothed, strict=True)
    lines = [
        json.dumps({"step": step, **dict(zip(names, map(float, row), strict=True))})
        for step, row in enumerate(rows, start=1)
    ]
    with files.replaced(folder / LINES) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    _draw(curve, folder / FIGURE)


def _draw(curve: RateCurve, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.semilogx(curve.rates, curve.losses, color="#999999", linewidth=0.8, label="loss")
    axes.semilogx(curve.rates, curve.smoothed, color="#0072b2", label="smoothed loss")
    axes.axvline(curve.suggestion, color="#d55e00", linestyle="--", label="suggestion")
    lowest, first = curve.smoothed[curve.lowest], curve.smoothed[0]
    fall = first - lowest
    axes.set(xlabel="learning rate", ylabel="training loss in nats per token")
    axes.set_ylim(lowest - 0.2 * fall, first + 0.5 * fall)  # the rise beyond has no end
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def table(curve: RateCurve) -> str:
    """Returns the losses at some learning rates and the suggestion, as lines of text."""
    places = np.linspace(0, len(curve.rates) - 1, min(_ROWS, len(curve.rates))).round().astype(int)
    rows = [
        f"{curve.rates[i]:13.3g} {curve.losses[i]:9.4f} {curve.smoothed[i]:9.4f}"
        f"{'  lowest' if i == curve.lowest else ''}"
        for i in sorted({*places.tolist(), curve.lowest})
    ]
    return "\n".join(
        [
            f"{'learning rate':>13} {'loss':>9} {'smoothed':>9}",
            *rows,
            f"suggestion: --config.optimizer.learning_rate={curve.suggestion:.2g}, a tenth of the "
            "learning rate with the lowest smoothed loss",
        ]
    )
