"""The figures of an ablation, as PNG files with a palette of 128 colours."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from PIL import Image

from moe_jax.ablation.ablation import Ablation
from moe_jax.ablation.derived import Record, Records, axis_of, by_arm, diverged, paired
from moe_jax.ablation.overlay import Overlay
from moe_jax.ablation.verdicts import Verdict

CURVES, AGAINST, OVERLAY, EFFECTS = "curves", "against", "overlay", "effects"
NAMES = (CURVES, AGAINST, OVERLAY, EFFECTS)
_INK, _PAPER = "#1f2328", "#ffffff"
_STYLE = {
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
    """Returns the figures that an ablation has."""
    there = {
        CURVES: True,
        AGAINST: bool(ablation.against),
        OVERLAY: ablation.overlay is not None,
        EFFECTS: any(found.effect for found in verdicts),
    }
    return [name for name, shown in there.items() if shown]


def draw(ablation: Ablation, records: Records, verdicts: Sequence[Verdict], folder: Path) -> None:
    """Writes every figure of the ablation to ``folder`` as a PNG file."""
    for name, figure in drawn(ablation, records, verdicts).items():
        _save(figure, folder / f"{name}.png")


def drawn(ablation: Ablation, records: Records, verdicts: Sequence[Verdict]) -> dict[str, Figure]:
    """Returns every figure of the ablation by its name."""
    drawings: dict[str, Callable[[], Figure]] = {
        CURVES: lambda: _curves(ablation, records),
        AGAINST: lambda: _against(ablation, records),
        OVERLAY: lambda: _overlay(ablation, ablation.overlay, records),
        EFFECTS: lambda: _effects(verdicts),
    }
    with matplotlib.rc_context(_STYLE):
        return {name: drawings[name]() for name in names(ablation, verdicts)}


def _curves(ablation: Ablation, records: Records) -> Figure:
    figure = Figure((8.0, 4.0), layout="constrained")
    axes = figure.subplots()
    _bands(axes, ablation, records, lambda line: np.array([step for step, _ in line["curve"]]))
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats per token)")
    axes.legend()
    return figure


def _against(ablation: Ablation, records: Records) -> Figure:
    count = len(ablation.against)
    figure = Figure((4.2 * count, 3.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, count, sharey=True))
    for axes, axis in zip(panels, ablation.against, strict=True):
        _bands(axes, ablation, records, lambda line, axis=axis: axis_of(line, axis))
        axes.set_xlabel(_AXES[axis])
        axes.set_xscale("log")
    panels[0].set_ylabel("training loss (nats per token)")
    panels[0].legend()
    return figure


def _bands(
    axes: Axes, ablation: Ablation, records: Records, place: Callable[[Record], np.ndarray]
) -> None:
    """Draws the mean and the range over seeds of each arm's loss.

    A run that diverged is drawn alone, with a cross at its end.
    """
    for number, (arm, mine) in enumerate(by_arm(ablation, records).items()):
        colour = f"C{number % 10}"
        whole = [line for line in mine if not diverged(line)]
        if whole:
            _band(axes, whole, place, colour, arm)
        lost = [line for line in mine if diverged(line) and line["curve"]]
        for line in lost:
            losses = [loss for _, loss in line["curve"]]
            label = None if whole or line is not lost[0] else arm
            axes.plot(place(line), losses, "-x", color=colour, markevery=[-1], label=label)


def _band(
    axes: Axes,
    mine: Records,
    place: Callable[[Record], np.ndarray],
    colour: str,
    label: str,
) -> None:
    # A run that is cut short must not stop the others from being drawn.
    length = min(len(line["curve"]) for line in mine)
    losses = np.array([[loss for _, loss in line["curve"][:length]] for line in mine])
    where = place(mine[0])[:length]
    axes.plot(where, losses.mean(0), color=colour, label=label)
    axes.fill_between(where, losses.min(0), losses.max(0), color=colour, alpha=0.15, linewidth=0)


def _overlay(ablation: Ablation, overlay: Overlay, records: Records) -> Figure:
    figure = Figure((8.0, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    arms = by_arm(ablation, records)
    start = overlay.places[overlay.first]
    found = [
        (place, effect)
        for arm, place in overlay.places.items()
        if arm in arms and overlay.first in arms
        if (effect := paired(arms[arm], arms[overlay.first], ablation.metric)) and place != start
    ]
    if found:
        places, effects = zip(*found, strict=True)
        means, halves = zip(*((e.mean, e.half_width) for e in effects), strict=True)
        axes.errorbar(
            (start, *places), (0, *means), (0, *halves), fmt="o-", capsize=3, label="measured here"
        )
    for name, values in overlay.series.items():
        shift = values.get(start, 0.0)
        places = sorted(values)
        axes.plot(places, [values[place] - shift for place in places], "s--", label=name)
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
    shown = [found for found in reversed(verdicts) if found.effect]
    for row, found in enumerate(shown):
        # Quantities of different units share the axis as multiples of their interval.
        half = found.effect.half_width or 1.0
        mean, margin = found.effect.mean / half, found.claim.margin / half
        width = found.effect.half_width / half
        axes.errorbar(mean, row, xerr=width, fmt="o", color="#0072b2", capsize=3)
        for side in (-margin, margin) if found.claim.within else (margin,):
            axes.plot([side] * 2, [row - 0.3, row + 0.3], color="#d55e00")
    names = [f"{found.claim.metric}: {found.claim.high} - {found.claim.low}" for found in shown]
    axes.set_yticks(range(len(names)), names)
    axes.axvline(0.0, color="#888888", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=5)
    ends = axes.get_xlim()
    axes.set_xticks([place for place in _TICKS if ends[0] <= place <= ends[1]])
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
