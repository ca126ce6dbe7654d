"""Draws the pairs of experts of one layer: how often and how similarly two experts work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_jax.analysis.figures import axes_of, drawn

_SIZE = (5.0, 4.0)


def maps_of(layer: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns titles and charts of the pairs of experts of one layer.

    A chart in which all pairs of different experts have no value is left out, such as experts that
    are chosen together under a router of one expert per token.

    Args:
        layer: Entry of ``layers`` of ``moe_jax.analyze``.
    """
    similarity = layer["similarity"]
    found = [
        ("Chosen together", layer["together"], "share of tokens", 0.0),
        ("Similarity of weights", similarity["weights"], "cosine", -1.0),
        ("Similarity of outputs", similarity["outputs"], "centred kernel alignment", 0.0),
    ]
    return [
        (title, expert_map(np.asarray(values, np.float64), label, lowest))
        for title, values, label, lowest in found
        if _known(np.asarray(values, np.float64))
    ]


def _known(values: np.ndarray) -> bool:
    """Returns whether a pair of different experts has a number ``(E, E)`` other than 0."""
    return bool(np.nan_to_num(values)[~np.eye(len(values), dtype=bool)].any())


@drawn
def expert_map(values: np.ndarray, label: str, lowest: float) -> Figure:
    """Draws one number of every pair of experts.

    Args:
        values: Numbers ``(E, E)``.
        label: Name of the number.
        lowest: Smallest value of the colours; the largest is 1.
    """
    figure, axes = axes_of("other expert", "expert", _SIZE)
    figure.subplots_adjust(right=0.94)
    colours = "PuOr_r" if lowest < 0 else "Blues"
    image = axes.imshow(values, cmap=colours, vmin=lowest, vmax=1.0, interpolation="none")
    figure.colorbar(image, ax=axes, label=label, pad=0.03)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.grid(False)
    return figure
