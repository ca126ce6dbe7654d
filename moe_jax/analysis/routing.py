"""Pictures of routing: the dispatch tensor of a plan, and a text coloured by its experts."""

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
    """Draws the answer of a router for one group.

    On the left the combine tensor ``(S, E, C)`` of GShard (Lepikhin et al. 2020, 2006.16668), its
    slots side by side: a row is a token, a column a slot, a line parts two experts, and darker is a
    larger weight. On the right what each expert was asked for: filled what got a slot, open what
    found it full.

    Args:
        plan: of one group, without a leading axis.
        title: above it; how many assignments were dropped and tokens left out follows.
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
    """Draws the combine weights of several plans, each under its name, in rows of ``columns``.

    They are ``(S, E)``, summed over the slots of an expert: a row is a token, a column an expert.
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
        pieces: the text of each token, ``N`` of them.
        experts: ``(N, E)``, not zero where the expert took the token; of several the first is
            shown, and a token that none took is white.
        columns: tokens in a row.

    Raises:
        ValueError: if there are not as many tokens as rows of experts.
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
    colours = ListedColormap(["white", *_pastels(number)])
    norm = BoundaryNorm(np.arange(-1.5, number), number + 1)
    image = axes.imshow(cells.reshape(rows, columns), cmap=colours, norm=norm, aspect="auto")
    for index, piece in enumerate(pieces):
        place = index % columns, index // columns
        axes.text(*place, visible(piece), ha="center", va="center", fontsize=9, family="monospace")
    axes.axis("off")
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.ax.set_ylim(-0.5, number - 0.5)
    bar.set_ticks(range(number), labels=[str(expert) for expert in range(number)])
    bar.set_label("expert")
    return figure


def _pastels(number: int) -> list[tuple[float, ...]]:
    palette = matplotlib.colormaps["tab20"].colors
    colours = np.array([palette[(2 * i + i // 10) % 20] for i in range(number)])
    return [tuple(0.45 * colour + 0.55) for colour in colours]


def _tensor(axes: Axes, combine: np.ndarray) -> None:
    tokens, experts, slots = combine.shape
    shown = combine.reshape(tokens, experts * slots)
    style = {"cmap": "Blues", "vmin": 0.0, "vmax": _darkest(shown), "interpolation": "none"}
    axes.imshow(shown, aspect="auto", **style)
    for edge in range(1, experts):
        axes.axvline(edge * slots - 0.5, color=_EDGE, linewidth=0.6)
    axes.set_xticks((np.arange(experts) + 0.5) * slots - 0.5, [f"e{e}" for e in range(experts)])


def _darkest(shown: np.ndarray) -> float:
    # Gates of experts that choose, or mix everything, are small: seen all the same.
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
    asked = float(plan.counts.demand.sum())
    return (
        f"{dropped:.0f} of {asked:.0f} assignments dropped, "
        f"{unrouted:.0f} of {float(plan.counts.valid):.0f} tokens without an expert"
    )
