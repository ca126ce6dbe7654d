"""Draws routing: the combine tensor of a plan, and a text in the colours of its experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from moe_jax.analysis.report import visible
from moe_jax.routing import Plan

_LOAD, _LOST, _EDGE = "#0072b2", "#d55e00", "#888888"


def draw_plan(plan: Plan, title: str = "") -> Figure:
    """Draws the plan of a router for one group.

    The left panel shows the combine tensor ``(S, E, C)`` of GShard (Lepikhin et al. 2020,
    2006.16668): a row is a token, a column a slot, a line separates two experts, and a darker cell
    has a larger weight. The right panel shows the choices of each expert: filled bars have slots,
    open bars are dropped.

    Args:
        plan: Plan of one group, without a leading axis.
        title: Title of the figure; the numbers of dropped choices and unrouted tokens follow it.
    """
    figure = Figure((11.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    _tensor(left, np.asarray(plan.combine, np.float32))
    left.set_xlabel("slots, expert by expert")
    left.set_ylabel("token")
    _bars(right, plan)
    figure.suptitle(f"{title}: {_in_words(plan)}" if title else _in_words(plan), fontsize=11)
    return figure


def draw_plans(plans: Mapping[str, Plan], columns: int = 6) -> Figure:
    """Draws the combine weights ``(S, E)`` of several plans, summed over the slots of an expert.

    A row is a token, and a column an expert.

    Args:
        plans: Plans of one group by name.
        columns: Number of plans side by side.
    """
    rows = -(-len(plans) // columns)
    figure = Figure((12.0, 12.0 / columns * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, plan) in zip(grid, plans.items(), strict=False):
        _tensor(axes, np.asarray(plan.combine, np.float32).sum(-1, keepdims=True))
        axes.set_title(name, fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    for axes in grid[len(plans) :]:
        axes.axis("off")
    return figure


def draw_text(pieces: Sequence[str], experts: np.ndarray, columns: int = 64) -> Figure:
    """Draws a text with every token in the colour of its expert.

    Args:
        pieces: Texts of the ``N`` tokens.
        experts: Array ``(N, E)``, nonzero if the expert processed the token. The colour is that
            of the first such expert; an unrouted token is white.
        columns: Number of tokens per row.

    Raises:
        ValueError: If ``pieces`` and ``experts`` have different numbers of tokens.
    """
    taken = np.asarray(experts) != 0
    if len(taken) != len(pieces):
        raise ValueError(f"{len(pieces)} pieces and experts of {len(taken)} tokens")
    number = taken.shape[1]
    first = np.where(taken.any(1), taken.argmax(1), -1)
    rows = -(-len(pieces) // columns)
    cells = np.full(rows * columns, -1)
    cells[: len(first)] = first
    figure = Figure((12.0, 0.32 * rows + 0.6), layout="constrained")
    axes = figure.subplots()
    colours = ListedColormap([(1.0, 1.0, 1.0), *_pastels(number)])
    norm = BoundaryNorm(np.arange(-1.5, number), number + 1)
    image = axes.imshow(cells.reshape(rows, columns), cmap=colours, norm=norm, aspect="auto")
    for index, piece in enumerate(pieces):
        x, y = index % columns, index // columns
        axes.text(x, y, visible(piece), ha="center", va="center", fontsize=9, family="monospace")
    axes.axis("off")
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.ax.set_ylim(-0.5, number - 0.5)
    bar.set_ticks(range(number), labels=[str(expert) for expert in range(number)])
    bar.set_label("expert")
    return figure


def _pastels(number: int) -> list[tuple[float, float, float]]:
    palette = matplotlib.colormaps["tab20"]
    colours = np.array([palette((2 * i + i // 10) % 20)[:3] for i in range(number)])
    return [tuple(0.45 * colour + 0.55) for colour in colours]


def _tensor(axes: Axes, combine: np.ndarray) -> None:
    tokens, experts, slots = combine.shape
    shown = combine.reshape(tokens, experts * slots)
    largest = _darkest(shown)
    axes.imshow(shown, aspect="auto", cmap="Blues", vmin=0.0, vmax=largest, interpolation="none")
    for edge in range(1, experts):
        axes.axvline(edge * slots - 0.5, color=_EDGE, linewidth=0.6)
    axes.set_xticks((np.arange(experts) + 0.5) * slots - 0.5, [f"e{e}" for e in range(experts)])


def _darkest(shown: np.ndarray) -> float:
    # The scale ends at the largest weight, because gates of experts that choose are small.
    return max(float(shown.max()), 1e-6)


def _bars(axes: Axes, plan: Plan) -> None:
    demand, load = (np.asarray(x) for x in (plan.counts.demand, plan.counts.load))
    experts = np.arange(len(load))
    axes.barh(experts, load, color=_LOAD, label="got a slot")
    axes.barh(experts, demand - load, left=load, fill=False, edgecolor=_LOST, label="found it full")
    axes.axvline(plan.combine.shape[-1], color=_EDGE, linestyle=":", label="capacity")
    axes.set_yticks(experts, [f"e{e}" for e in experts])
    axes.invert_yaxis()
    axes.set_xlabel("assignments")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.spines[["top", "right"]].set_visible(False)


def _in_words(plan: Plan) -> str:
    dropped, unrouted = float(plan.counts.dropped), float(plan.counts.unrouted)
    demand = float(plan.counts.demand.sum())
    return (
        f"{dropped:.0f} of {demand:.0f} assignments dropped, "
        f"{unrouted:.0f} of {float(plan.counts.valid):.0f} tokens without an expert"
    )
