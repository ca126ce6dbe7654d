"""Draws figures that compare runs, in the style of the figures of one run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, NullLocator

from moe_jax.analysis.figures import COLOURS, axes_of, colour_of, drawn, thinned

# Share of a run that a point of a training curve is the mean of.
_SMOOTHED = 20
_LOG_SPAN, _TICKS = 9.0, 8
_UNITS = {"loss": "validation loss (nats per token)", "accuracy": "accuracy (share of tokens)"}


@dataclasses.dataclass(frozen=True)
class Curve:
    """The loss of a run over one axis.

    Attributes:
        x: Places ``(T,)`` of the training losses.
        loss: Training losses ``(T,)``.
        eval_x: Places ``(N,)`` of the validations.
        eval_loss: Validation losses ``(N,)``.
    """

    x: np.ndarray
    loss: np.ndarray
    eval_x: np.ndarray
    eval_loss: np.ndarray


def colours(count: int) -> list[str]:
    """Returns the colours of runs for a style sheet; the first is the accent of the page."""
    named = [to_hex(colour_of(index, count)) for index in range(count)]
    return [f"var(--accent, {one})" if one == COLOURS[0] else one for one in named]


@drawn
def losses(curves: Sequence[Curve], label: str) -> Figure:
    """Draws the smoothed training loss of every run as a line and its validations as dots."""
    figure, axes = axes_of(label, "loss (nats per token)")
    axes.xaxis.set_major_locator(AutoLocator())
    for index, curve in enumerate(curves):
        colour = colour_of(index, len(curves))
        x, loss = _smoothed(curve.x, curve.loss)
        axes.plot(*thinned(x, loss), "-" if len(x) > 1 else "o", color=colour, linewidth=1.2)
        axes.plot(curve.eval_x, curve.eval_loss, "o", color=colour, markersize=4)
    return figure


@drawn
def metric_by_setting(records: Sequence[Mapping[str, Any]], name: str, metric: str) -> Figure:
    """Draws the metric of every run over the value of one setting.

    Args:
        records: One record for each run; the setting has a text, the metric a number.
        name: Key of the setting.
        metric: Key of the metric.
    """
    figure, axes = axes_of(name, _UNITS.get(metric, metric.replace("_", " ")))
    values = [record[metric] for record in records]
    texts = [record[name] for record in records]
    numbers = _numbers(texts)
    if numbers is None:
        order = sorted(set(texts))
        numbers = [float(order.index(text)) for text in texts]
    elif min(numbers) > 0 and max(numbers) > _LOG_SPAN * min(numbers):
        axes.set_xscale("log")
    axes.margins(x=0.08)
    axes.plot(numbers, values, "o", color=COLOURS[0])
    places = dict(zip(numbers, texts, strict=True))
    if len(places) <= _TICKS:
        axes.set_xticks([*places], [*places.values()])
        axes.xaxis.set_minor_locator(NullLocator())
    elif axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(AutoLocator())
    return figure


def _numbers(texts: Sequence[str]) -> list[float] | None:
    try:
        return [float(text) for text in texts]
    except ValueError:
        return None


def _smoothed(x: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the middles and the means of windows of a twentieth of the run."""
    width = len(loss) // _SMOOTHED
    if width < 2:
        return x, loss
    means = np.convolve(loss, np.ones(width) / width, mode="valid")
    start = width // 2
    return x[start : start + len(means)], means
