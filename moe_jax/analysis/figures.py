"""Figures of a run as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

Records = Sequence[dict[str, Any]]

# Okabe and Ito's palette: told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def svg(figure: Figure) -> str:
    """Returns the figure as an ``<svg>`` element for HTML."""
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", transparent=True)
    return text.getvalue()[text.getvalue().index("<svg") :]


def loss_curve(train: Records, evaluations: Records) -> Figure:
    """Training loss, its moving mean, and validation loss over steps, in nats per token."""
    figure, axes = _axes("step", "loss (nats per token)")
    steps, losses = _series(train, "loss")
    axes.plot(steps, losses, color=_COLOURS[0], alpha=0.35, linewidth=0.8, label="training")
    width = max(1, len(losses) // 20)
    if width > 1:
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color=_COLOURS[0], label="training, smoothed")
    if evaluations:
        axes.plot(*_series(evaluations, "loss"), "o", color=_COLOURS[1], label="validation")
    axes.legend(frameon=False)
    return figure


def lines(train: Records, key: str, label: str) -> Figure:
    """One number of the records over steps."""
    figure, axes = _axes("step", label)
    axes.plot(*_series(train, key), color=_COLOURS[0], linewidth=1.0)
    return figure


def layer_lines(train: Records, label: str, *path: str) -> Figure:
    """One number of every MoE layer over steps; ``path`` leads to it inside a layer's record."""
    figure, axes = _axes("step", label)
    for index, layer in enumerate(train[0]["layers"]):
        values = [_at(record["layers"][index], path) for record in train]
        colour = _COLOURS[index % len(_COLOURS)]
        steps = [record["step"] for record in train]
        axes.plot(steps, values, color=colour, linewidth=1.0, label=f"layer {layer['layer']}")
    axes.legend(frameon=False)
    return figure


def load_map(train: Records, index: int) -> Figure:
    """Load of every expert of the ``index``-th MoE layer over steps; 1 is an even share."""
    load = np.array([record["layers"][index]["load"] for record in train]).T
    figure, axes = _axes("step", "expert")
    steps = [record["step"] for record in train]
    extent = (steps[0], steps[-1] + 1, load.shape[0] - 0.5, -0.5)
    image = axes.imshow(
        load * load.shape[0], aspect="auto", extent=extent, cmap="cividis", vmin=0.0, vmax=2.0,
        interpolation="nearest",
    )  # fmt: skip
    figure.colorbar(image, ax=axes, label="load / even share")
    axes.set_title(f"layer {train[0]['layers'][index]['layer']}", loc="left", fontsize=10)
    return figure


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.4, 3.0))
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _series(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(record["step"], record[key]) for record in records if record[key] is not None]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps), np.array(values)


def _at(value: Any, path: Sequence[str]) -> Any:
    for key in path:
        value = value[key]
    return value
