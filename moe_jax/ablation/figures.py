"""The figures of an ablation, as PNG files with a palette of 128 colours."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from PIL import Image

from moe_jax.ablation.ablation import Ablation
from moe_jax.ablation.derived import (
    Record,
    Records,
    axis_of,
    by_arm,
    diverged,
    paired,
    step_seconds,
)
from moe_jax.ablation.overlay import Overlay
from moe_jax.ablation.verdicts import Verdict

CURVES, AGAINST, OVERLAY, EFFECTS = "curves", "against", "overlay", "effects"
NAMES = (CURVES, AGAINST, OVERLAY, EFFECTS)
_INK, _PAPER = "#1f2328", "#ffffff"
# The keys are ``Any``: the Matplotlib stub accepts only literal names of settings as keys.
_STYLE: dict[Any, Any] = {
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.4,
    "savefig.facecolor": _PAPER,
    "figure.facecolor": _PAPER,
    "axes.facecolor": _PAPER,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
    ),
}
_TICKS = (-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50)
_AXES = {
    "tokens": "training tokens",
    "flops": "training FLOPs",
    "energy": "estimated energy (J)",
}


def names(ablation: Ablation, verdicts: Sequence[Verdict]) -> list[str]:
    """Returns the names of the figures of an ablation."""
    figures = {
        CURVES: True,
        AGAINST: bool(ablation.against),
        OVERLAY: ablation.overlay is not None,
        EFFECTS: any(verdict.effect for verdict in verdicts),
    }
    return [name for name, shown in figures.items() if shown]


def draw(ablation: Ablation, records: Records, verdicts: Sequence[Verdict], folder: Path) -> None:
    """Writes every figure of the ablation to ``folder`` as a PNG file."""
    for name, figure in drawn(ablation, records, verdicts).items():
        _save(figure, folder / f"{name}.png")


def drawn(ablation: Ablation, records: Records, verdicts: Sequence[Verdict]) -> dict[str, Figure]:
    """Returns every figure of the ablation by its name."""
    drawings: dict[str, Callable[[], Figure]] = {
        CURVES: lambda: _curves(ablation, records),
        AGAINST: lambda: _against(ablation, records),
        EFFECTS: lambda: _effects(verdicts),
    }
    overlay = ablation.overlay
    if overlay is not None:
        drawings[OVERLAY] = functools.partial(_overlay, ablation, overlay, records)
    with matplotlib.rc_context(_STYLE):
        return {name: drawings[name]() for name in names(ablation, verdicts)}


def _curves(ablation: Ablation, records: Records) -> Figure:
    seconds = step_seconds(records)
    timed = [line for line in records if line["arm"] in seconds]
    figure = Figure((8.0, 4.0), layout="constrained")
    panels = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    _bands(panels[0], ablation, records, _steps)
    panels[0].set_xlabel("step")
    panels[0].set_ylabel("training loss (nats per token)")
    panels[0].legend()
    if timed:
        _bands(panels[1], ablation, timed, lambda line: _steps(line) * seconds[line["arm"]])
        panels[1].set_xlabel("seconds at the median speed of the arm")
    return figure


def _steps(line: Record) -> np.ndarray:
    return np.array([step for step, _ in line["curve"]], float)


def _against(ablation: Ablation, records: Records) -> Figure:
    count = len(ablation.against)
    figure = Figure((4.2 * count, 3.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, count, sharey=True))
    for axes, axis in zip(panels, ablation.against, strict=True):
        _bands(axes, ablation, records, functools.partial(axis_of, axis=axis))
        axes.set_xlabel(_AXES[axis])
        axes.set_xscale("log")
    panels[0].set_ylabel("training loss (nats per token)")
    panels[0].legend()
    return figure


def _bands(
    axes: Axes, ablation: Ablation, records: Records, x_of: Callable[[Record], np.ndarray]
) -> None:
    """Draws the mean and the range over seeds of the loss of each arm.

    A diverged run has a separate line, with a cross at its end.
    """
    colours = {arm: f"C{number % 10}" for number, arm in enumerate(ablation.arms)}
    for arm, lines in by_arm(ablation, records).items():
        colour = colours[arm]
        whole = [line for line in lines if not diverged(line)]
        if whole:
            _band(axes, whole, x_of, colour, arm)
        lost = [line for line in lines if diverged(line) and line["curve"]]
        for line in lost:
            losses = [loss for _, loss in line["curve"]]
            label = None if whole or line is not lost[0] else arm
            axes.plot(x_of(line), losses, "-x", color=colour, markevery=[-1], label=label)


def _band(
    axes: Axes,
    lines: Records,
    x_of: Callable[[Record], np.ndarray],
    colour: str,
    label: str,
) -> None:
    # All lines end with the shortest run, so that a run that was cut short can be drawn.
    length = min(len(line["curve"]) for line in lines)
    losses = np.array([[loss for _, loss in line["curve"][:length]] for line in lines])
    x = x_of(lines[0])[:length]
    axes.plot(x, losses.mean(0), color=colour, label=label)
    axes.fill_between(x, losses.min(0), losses.max(0), color=colour, alpha=0.15, linewidth=0)


def _overlay(ablation: Ablation, overlay: Overlay, records: Records) -> Figure:
    figure = Figure((8.0, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    arms = by_arm(ablation, records)
    start = overlay.places[overlay.first]
    measured = [
        (place, effect)
        for arm, place in overlay.places.items()
        if arm in arms and overlay.first in arms
        if (effect := paired(arms[arm], arms[overlay.first], ablation.metric)) and place != start
    ]
    if measured:
        places, effects = zip(*measured, strict=True)
        means, halves = zip(*((e.mean, e.half_width) for e in effects), strict=True)
        axes.errorbar(
            (start, *places), (0, *means), (0, *halves), fmt="o-", capsize=3, label="measured here"
        )
    for name, values in overlay.series.items():
        shift = values.get(start, 0.0)
        points = sorted(values)
        axes.plot(points, [values[point] - shift for point in points], "s--", label=name)
    ends = sorted({*overlay.places.values(), *(p for v in overlay.series.values() for p in v)})
    grid = np.geomspace(ends[0], ends[-1], 100)
    for name, law in overlay.laws.items():
        axes.plot(grid, [law(float(place)) - law(start) for place in grid], ":", label=name)
    axes.axhline(0.0, color="#888888", linewidth=0.8)
    axes.set_xlabel(overlay.label)
    axes.set_ylabel(f"loss - {overlay.first} (nats)")
    axes.legend()
    return figure


def _effects(verdicts: Sequence[Verdict]) -> Figure:
    figure = Figure((8.0, 1.0 + 0.5 * len(verdicts)), layout="constrained")
    axes = figure.subplots()
    shown = [(found.claim, found.effect) for found in reversed(verdicts) if found.effect]
    for row, (claim, effect) in enumerate(shown):
        # Effects of different units share the axis as multiples of their half-width.
        half = effect.half_width or 1.0
        mean, margin = effect.mean / half, claim.margin / half
        width = effect.half_width / half
        axes.errorbar(mean, row, xerr=width, fmt="o", color="#0072b2", capsize=3)
        for side in (-margin, margin) if claim.within else (margin,):
            axes.plot([side] * 2, [row - 0.3, row + 0.3], color="#d55e00")
    names = [f"{claim.metric}: {claim.high} - {claim.low}" for claim, _ in shown]
    axes.set_yticks(range(len(names)), names)
    axes.axvline(0.0, color="#888888", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=5)
    ends = axes.get_xlim()
    axes.set_xticks([tick for tick in _TICKS if ends[0] <= tick <= ends[1]])
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("effect in half-widths of its 95 % interval, and the margin claimed")
    return figure


def _save(figure: Figure, path: Path) -> None:
    file = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(file, format="png", dpi=110)
    image = Image.open(file).convert("RGB")
    # A palette of 128 colours is enough for plots and takes a third of the bytes.
    image.quantize(128, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)
