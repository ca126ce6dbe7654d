"""Draws figures of a run as inline SVG with the text colour and font of the surrounding page."""

from __future__ import annotations

import functools
import inspect
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

Records = Sequence[Mapping[str, Any]]
P = ParamSpec("P")

# Okabe and Ito's palette: colour-blind readers can distinguish it, also on a dark background.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
_INK = "#010203"
# The page can choose these colours for a light or dark background.
_OF_PAGE = {_INK: "currentColor", COLOURS[0]: f"var(--accent, {COLOURS[0]})"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moe_jax",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "axes.xmargin": 0.01,
    "grid.color": "#888888",
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.fontsize": 9,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
    ),
}
_WIDE, _NARROW = (13.0, 3.6), (6.4, 3.0)
_INCHES = {"left": 0.9, "right": 0.1, "bottom": 0.5, "top": 0.1}
_POINTS, _COLUMNS, _COLUMNS_OF_ALL = 600, 200, 2000


def drawn(draw: Callable[P, Figure]) -> Callable[P, str]:
    """Wraps a function that returns a figure, so that it returns the ``<svg>`` element."""

    @functools.wraps(draw)
    def element(*args: P.args, **kwargs: P.kwargs) -> str:
        with matplotlib.rc_context(_STYLE):
            return _svg(draw(*args, **kwargs))

    return element


def figure_of(draw: Callable[P, str], *args: P.args, **kwargs: P.kwargs) -> Figure:
    """Returns the figure of one of the functions below, for a notebook or a PNG."""
    with matplotlib.rc_context(_STYLE):
        return inspect.unwrap(draw)(*args, **kwargs)


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for colour, chosen in _OF_PAGE.items():
        text = text.replace(colour, chosen)
    # Coordinates with two decimals suffice and halve the size of the file.
    text = re.sub(r"[ML] [-.\d ]+", lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", text, count=1)


@drawn
def loss_curve(train: Records, evaluations: Records) -> Figure:
    """Draws training loss, its moving mean over a twentieth of the run, and validation losses.

    Each part of a blend has a line of its own.
    """
    figure, axes = axes_of("step", "loss (nats per token)", _WIDE)
    steps, losses = _series(train, "loss")
    width = len(losses) // 20
    style: dict[str, Any] = {"alpha": 0.4, "linewidth": 0.8} if width > 1 else {}
    axes.plot(*thinned(steps, losses), _dash(steps), color=COLOURS[0], label="training", **style)
    if width > 1:
        mean = np.convolve(losses, np.ones(width) / width, mode="valid")
        label = f"training, mean of {width} records"
        middle = steps[width // 2 : width // 2 + len(mean)]
        axes.plot(*thinned(middle, mean), color=COLOURS[0], label=label)
    if evaluations:
        axes.plot(
            *_series(evaluations, "loss"), "o-", color=COLOURS[1], markersize=4, label="validation"
        )
        _draw_parts(axes, evaluations)
    axes.legend()
    return figure


def _draw_parts(axes: Axes, evaluations: Records) -> None:
    """Draws the validation loss of each part of a blend."""
    for number, name in enumerate(evaluations[-1].get("parts", {}), 2):
        known = [record for record in evaluations if name in record.get("parts", {})]
        steps = [record["step"] for record in known]
        losses = [record["parts"][name]["loss"] for record in known]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(steps, losses, "o--", color=colour, markersize=3, linewidth=0.8, label=name)


@drawn
def line(train: Records, key: str, label: str, *, log: bool = False) -> Figure:
    """Draws one number of the records over steps."""
    figure, axes = axes_of("step", label)
    steps, values = _series(train, key)
    axes.plot(*thinned(steps, values), _dash(steps), color=COLOURS[0], linewidth=1.0)
    if log:
        axes.set_yscale("log", nonpositive="clip")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        # Longer numbers would push the label of the axis out of the figure.
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    return figure


@drawn
def layer_lines(train: Records, label: str, *path: str) -> Figure:
    """Draws one number of every MoE layer over steps, averaged over bins of steps.

    Args:
        train: Training records with at least one layer.
        label: Label of the number.
        *path: Keys of the number in the record of a layer.
    """
    figure, axes = axes_of("step", label)
    layers = train[0]["layers"]
    steps = np.array([record["step"] for record in train])
    for index, layer in enumerate(layers):
        values = np.array([_at(record["layers"][index], path) for record in train], np.float64)
        edges, means = _binned(steps, values, len(layers))
        shown = len(layers) <= len(COLOURS) or index in (0, len(layers) // 2, len(layers) - 1)
        axes.plot(
            (edges[:-1] + edges[1:]) / 2 if len(means) < len(steps) else steps,
            means,
            _dash(steps),
            color=colour_of(index, len(layers)),
            linewidth=1.2,
            label=f"layer {layer['layer']}" if shown else None,
        )
    axes.legend(ncols=min(3, len(layers)))
    return figure


@drawn
def load_map(train: Records, index: int) -> Figure:
    """Draws the load of every expert of the ``index``-th MoE layer over steps; 1 is even."""
    figure, axes = axes_of("step", "expert")
    figure.subplots_adjust(right=0.99)
    steps = np.array([record["step"] for record in train])
    load = np.array([record["layers"][index]["load"] for record in train], np.float64)
    edges, means = _binned(steps, load, len(train[0]["layers"]))
    num_experts = means.shape[1]
    image = axes.imshow(
        means.T * num_experts,
        aspect="auto",
        extent=(edges[0], edges[-1], num_experts - 0.5, -0.5),
        cmap="PuOr_r",
        vmin=0.0,
        vmax=2.0,
        interpolation="none",
    )
    figure.colorbar(image, ax=axes, label="load / even share", extend="max", pad=0.02)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.grid(False)
    return figure


def axes_of(x: str, y: str, size: tuple[float, float] = _NARROW) -> tuple[Figure, Axes]:
    """Returns an empty figure and its axes with these labels."""
    figure = Figure(figsize=size)
    width, height = size
    figure.subplots_adjust(
        left=_INCHES["left"] / width,
        right=1 - _INCHES["right"] / width,
        bottom=_INCHES["bottom"] / height,
        top=1 - _INCHES["top"] / height,
    )
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    return figure, axes


def _dash(steps: np.ndarray) -> str:
    """Returns matplotlib's format for a line, or for a dot if there is only one step."""
    return "-" if len(steps) > 1 else "o"


def colour_of(index: int, layers: int) -> Any:
    """Returns the colour of one of several lines."""
    if layers <= len(COLOURS):
        return COLOURS[index]
    return matplotlib.colormaps["viridis"](0.1 + 0.75 * index / (layers - 1))


def _series(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values ``(T,)`` of the records that have a value."""
    pairs = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps), np.array(values, np.float64)


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns at most ``_POINTS`` of the points: the least and the greatest of each bin."""
    if len(values) <= _POINTS:
        return steps, values
    bins = np.array_split(np.arange(len(values)), _POINTS // 2)
    ends = [{part[values[part].argmin()], part[values[part].argmax()]} for part in bins]
    index = np.array([i for pair in ends for i in sorted(pair)])
    return steps[index], values[index]


def _binned(steps: np.ndarray, values: np.ndarray, layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns edges ``(B + 1,)`` of even bins over steps ``(T,)`` and means ``(B, ...)``.

    A bin without a record has the value of the next record. The number of bins falls with the
    number of layers, to bound the size of the page.
    """
    count = min(len(steps), _COLUMNS, max(_COLUMNS_OF_ALL // layers, 1))
    edges = np.linspace(steps[0], steps[-1] if count > 1 else steps[0] + 1, count + 1)
    first = np.minimum(np.searchsorted(steps, edges[:-1]), len(steps) - 1)
    size = np.maximum(np.diff(first, append=len(steps)), 1)
    sums = np.add.reduceat(values, first, axis=0)
    return edges, sums / size.reshape(-1, *[1] * (values.ndim - 1))


def _at(value: Any, path: Sequence[str]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
