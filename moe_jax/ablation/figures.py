"""The figures of an ablation, as PNG files with a palette of 128 colours."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from moe_jax.ablation.ablation import Ablation
from moe_jax.ablation.derived import (
    IN_NATS,
    Record,
    Records,
    axis_of,
    by_arm,
    by_size,
    diverged,
    paired,
    smoothed,
    step_seconds,
)
from moe_jax.ablation.intervals import Interval
from moe_jax.ablation.overlay import Overlay
from moe_jax.ablation.sizes import WHOLE, MeasuredSeries, PublishedSeries, QualityBySize
from moe_jax.ablation.verdicts import CONTRADICTED, REPRODUCED, Verdict

CURVES, AGAINST, OVERLAY, SIZES, EFFECTS = "curves", "against", "overlay", "sizes", "effects"
NAMES = (CURVES, AGAINST, OVERLAY, SIZES, EFFECTS)
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
_DASHES = ("-", "--", ":")
_COLOURS = {REPRODUCED: "#0072b2", CONTRADICTED: "#d55e00"}
_UNDECIDED = "#667079"
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
        SIZES: ablation.sizes is not None,
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
        EFFECTS: lambda: _effects(ablation, verdicts),
    }
    overlay = ablation.overlay
    if overlay is not None:
        drawings[OVERLAY] = functools.partial(_overlay, ablation, overlay, records)
    sizes = ablation.sizes
    if sizes is not None:
        drawings[SIZES] = functools.partial(_sizes, ablation, sizes, records)
    with matplotlib.rc_context(_STYLE):
        return {name: drawings[name]() for name in names(ablation, verdicts)}


def _curves(ablation: Ablation, records: Records) -> Figure:
    """Draws the loss minus the baseline's by step, above the loss by step and by seconds."""
    seconds = step_seconds(records)
    timed = [line for line in records if line["arm"] in seconds]
    first = baseline(ablation, records)
    lower = ["steps", "seconds" if timed else "steps"]
    rows: list[Any] = [["difference"] * 2, lower] if first else [lower]
    figure = Figure((8.0, 6.4 if first else 3.6), layout="constrained")
    heights = (3, 2) if first else None
    panels = figure.subplot_mosaic(rows, height_ratios=heights)
    if first:
        _differences(panels["difference"], ablation, records, first)
    _bands(panels["steps"], ablation, records, _steps)
    panels["steps"].set_xlabel("step")
    panels["steps"].set_ylabel("training loss (nats)")
    if not first:
        panels["steps"].legend()
    if timed:
        panels["seconds"].sharey(panels["steps"])
        _bands(panels["seconds"], ablation, timed, lambda line: _steps(line) * seconds[line["arm"]])
        panels["seconds"].set_xlabel("seconds at the median speed of the arm")
    return figure


def baseline(ablation: Ablation, records: Records) -> str:
    """Returns the arm that others are compared with; "" if there is none.

    It is the threshold arm, or else the first arm, if another arm has its seeds and its number of
    steps, of more than one; otherwise it is the first arm of which this holds.
    """
    whole = [line for line in records if len(line["curve"]) > 1 and not diverged(line)]
    runs: dict[str, set[tuple[int, int]]] = {}
    for line in whole:
        runs.setdefault(line["arm"], set()).add((line["seed"], line["steps"]))
    arms = [arm for arm in (ablation.threshold_arm, *ablation.arms) if arm in runs]
    compared = (a for a in arms if any(runs[a] & runs[b] for b in runs if b != a))
    return next(compared, "")


def _differences(axes: Axes, ablation: Ablation, records: Records, first: str) -> None:
    """Draws the smoothed training loss of each arm minus the baseline's of the same seed.

    Arms with another number of steps than the baseline are left out.
    """
    whole = [line for line in records if len(line["curve"]) > 1 and not diverged(line)]
    theirs = {line["seed"]: line for line in whole if line["arm"] == first}
    for arm, lines in by_arm(ablation, whole).items():
        pairs = [(line, theirs[line["seed"]]) for line in lines if line["seed"] in theirs]
        both = [(ours, base) for ours, base in pairs if ours["steps"] == base["steps"]]
        if arm == first or not both:
            continue
        steps = smoothed(both[0][1]["curve"])[0]
        values = np.array([_at(steps, ours) - _at(steps, base) for ours, base in both])
        style = _line_of(ablation, arm)
        axes.plot(steps, values.mean(0), label=arm, **style)
        axes.fill_between(
            steps, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0
        )
    axes.axhline(0.0, color="#888888", linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss - {first} (nats)")
    axes.legend(fontsize="small", ncols=2)


def _at(steps: np.ndarray, line: Record) -> np.ndarray:
    """Returns the smoothed training loss at some steps, ``(T,)``."""
    return np.interp(steps, *smoothed(line["curve"]))


def _steps(line: Record) -> np.ndarray:
    return np.array([step for step, _ in line["curve"]], float)


def _line_of(ablation: Ablation, arm: str) -> dict[str, Any]:
    """Returns colour and style of the line of an arm; ten arms have one style."""
    number = list(ablation.arms).index(arm)
    return {"color": f"C{number % 10}", "linestyle": _DASHES[number // 10 % len(_DASHES)]}


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
    drawn = [line for line in records if line["curve"]]
    for arm, lines in by_arm(ablation, drawn).items():
        style = _line_of(ablation, arm)
        whole = [line for line in lines if not diverged(line)]
        if whole:
            _band(axes, whole, x_of, style, arm)
        lost = [line for line in lines if diverged(line)]
        for line in lost:
            losses = [loss for _, loss in line["curve"]]
            label = None if whole or line is not lost[0] else arm
            axes.plot(x_of(line), losses, marker="x", markevery=[-1], label=label, **style)


def _band(
    axes: Axes,
    lines: Records,
    x_of: Callable[[Record], np.ndarray],
    style: dict[str, Any],
    label: str,
) -> None:
    # All lines end with the shortest run, so that a run that was cut short can be drawn.
    length = min(len(line["curve"]) for line in lines)
    losses = np.array([[loss for _, loss in line["curve"][:length]] for line in lines])
    x = x_of(lines[0])[:length]
    axes.plot(x, losses.mean(0), label=label, **style)
    axes.fill_between(
        x, losses.min(0), losses.max(0), color=style["color"], alpha=0.15, linewidth=0
    )


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


def _sizes(ablation: Ablation, sizes: QualityBySize, records: Records) -> Figure:
    """Draws measured losses and published scores by size, relative to the unchanged model."""
    figure = Figure((9.0, 5.8), layout="constrained")
    ours, theirs = figure.subplots(1, 2, sharex=True)
    _measured_sizes(ours, ablation, sizes, records)
    _published_sizes(theirs, sizes)
    for axes in (ours, theirs):
        axes.set_xlabel("share of the bytes of the unchanged experts")
        if axes.get_legend_handles_labels()[0]:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}
            axes.legend(fontsize="small", handlelength=4, **below)
    return figure


def _measured_sizes(axes: Axes, ablation: Ablation, sizes: QualityBySize, records: Records) -> None:
    """Draws the intervals of each series; those of one size stand side by side."""
    styles = _styles_of(sizes.measured, sizes)
    for number, (name, series) in enumerate(sizes.measured.items()):
        effects = by_size(ablation, series, records)
        if not effects:
            continue
        aside = 0.008 * (number - (len(styles) - 1) / 2)
        points = [(s + aside, e.mean, e.half_width) for s, e in effects.items()]
        places, means, halves = zip(*sorted([(WHOLE, 0.0, 0.0), *points]), strict=True)
        axes.errorbar(places, means, halves, fmt="o", capsize=2, label=name, **styles[name])
    axes.axhline(0.0, color="#888888", linewidth=0.8)
    unit = " (nats)" if ablation.metric in IN_NATS else ""
    axes.set_ylabel(f"{ablation.metric} - unchanged model's{unit}")
    axes.set_title("measured here")


def _published_sizes(axes: Axes, sizes: QualityBySize) -> None:
    styles = _styles_of(sizes.published, sizes)
    for name, series in sizes.published.items():
        places, shares = zip(*sorted(series.relative.items()), strict=True)
        axes.plot(places, shares, marker="s", label=name, **styles[name])
    axes.axhline(1.0, color="#888888", linewidth=0.8)
    axes.set_ylabel("score / unchanged model's")
    axes.set_title("published")


def _styles_of(
    series: Mapping[str, MeasuredSeries] | Mapping[str, PublishedSeries], sizes: QualityBySize
) -> dict[str, dict[str, Any]]:
    """Returns the style of each series: a colour per method, and dashes within a method."""
    styles = {}
    drawn = dict.fromkeys(sizes.methods, 0)
    for name, one in series.items():
        colour = sizes.methods.index(one.method) % 10
        dashes = _DASHES[drawn[one.method] % len(_DASHES)]
        styles[name] = {"color": f"C{colour}", "linestyle": dashes, "markersize": 4}
        drawn[one.method] += 1
    return styles


def _effects(ablation: Ablation, verdicts: Sequence[Verdict]) -> Figure:
    """Draws each measured effect beside the published one; every unit has a panel."""
    units: dict[str, list[tuple[Verdict, Interval]]] = {}
    for found in verdicts:
        if found.effect:
            metric = found.claim.metric
            unit = "nats" if metric in IN_NATS else metric
            units.setdefault(unit, []).append((found, found.effect))
    counts = [len(rows) for rows in units.values()]
    figure = Figure((8.0, 0.9 * len(units) + 0.4 * sum(counts)), layout="constrained")
    panels = figure.subplots(
        len(units), 1, squeeze=False, height_ratios=[2.25 + count for count in counts]
    )[:, 0]
    for axes, (unit, rows) in zip(panels, units.items(), strict=True):
        _effect_rows(axes, ablation, rows)
        axes.set_xlabel(f"effect ({unit}); diamond: published, band: margin")
    return figure


def _effect_rows(axes: Axes, ablation: Ablation, rows: Sequence[tuple[Verdict, Interval]]) -> None:
    for row, (found, effect) in enumerate(reversed(rows)):
        claim = found.claim
        colour = _COLOURS.get(found.text.split(":")[0], _UNDECIDED)
        axes.errorbar(effect.mean, row, xerr=effect.half_width, fmt="o", color=colour, capsize=3)
        if claim.margin:
            low, high = sorted((-claim.margin if claim.within else 0.0, claim.margin))
            axes.fill_betweenx((row - 0.35, row + 0.35), low, high, color="#888888", alpha=0.25)
        published = ablation.effect(claim).value
        if published is not None:
            axes.plot(published, row, "D", markerfacecolor="none", markeredgecolor=_INK)
    names = [f"{found.claim.high} - {found.claim.low}" for found, _ in reversed(rows)]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.axvline(0.0, color="#888888", linewidth=0.8)


def _save(figure: Figure, path: Path) -> None:
    file = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(file, format="png", dpi=110)
    image = Image.open(file).convert("RGB")
    # A palette of 128 colours is enough for plots and takes a third of the bytes.
    image.quantize(128, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)
