"""Compares the predictions of published scaling laws with the numbers in their papers.

``python -m tools.scaling_laws --output=FOLDER`` prints the comparison as Markdown and draws both
laws to ``scaling_laws.png``. The module ``moe_jax.counting.laws`` defines the laws.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_jax.cli import common
from moe_jax.counting.laws import (
    DENSE,
    GRANULARITIES,
    HASH,
    MOE,
    PUBLISHED,
    RL_R,
    S_BASE,
    Clark,
    blocks_of,
    compute_optimal,
    saving,
    total_parameters,
)

_LAWS = {"S-BASE": S_BASE, "RL-R": RL_R, "HASH": HASH}
_SIZES, _EXPERTS = (15e6, 130e6, 1.3e9), (1, 8, 64, 512)
# Active parameters, tokens, and the first and last loss of the curve in figure 3a.
_SPLITS = ((25e6, 66e9, "3.12 to 2.95"), (3e6, 16e9, "-"))
_SPLIT_BY = (1, 2, 4, 8, 16)
_SAVINGS = ((1e20, "20"), (1e25, "over 40"))


def _short(value: float) -> str:
    """Returns a count with its unit letter, as papers print it: 1.3B."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= scale:
            return f"{value / scale:.4g}{letter}"
    return f"{value:g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report() -> str:
    """Returns the predictions of both laws and the numbers of the papers, as Markdown."""
    return "\n".join(
        (
            "# Scaling laws\n",
            "Losses in nats per token. The papers use different data, so their losses do not "
            "compare.\n",
            "## Clark et al. 2022: parameters and experts, 130B tokens\n",
            "In parentheses: number of parameters of the dense model of equal loss.\n",
            _clark_table(),
            "## Krajewski et al. 2024: compute-optimal models of 64 experts\n",
            _optima_table(),
            "Compute-optimal models that `compute_optimal` finds for the same budgets:\n",
            _search_table(),
            "## Krajewski et al. 2024: granularity\n",
            _granularity_table(),
            "## Krajewski et al. 2024: FLOPs of a dense model of equal loss over MoE FLOPs\n",
            _savings_table(),
        )
    )


def _clark_table() -> str:
    def cell(law: Clark, size: float, experts: int) -> str:
        dense = _short(float(f"{law.effective_parameters(size, experts):.3g}"))
        return f"{law.loss(size, experts):.3f} ({dense})"

    return _table(
        ["router", "N", *(f"E={experts}" for experts in _EXPERTS)],
        (
            [name, _short(size), *(cell(law, size, experts) for experts in _EXPERTS)]
            for name, law in _LAWS.items()
            for size in _SIZES
        ),
    )


def _optima_table() -> str:
    header = ["N active", "D", "G", "FLOPs published", "predicted", "deviation"]
    rows = []
    for row in PUBLISHED:
        cost, loss = row.predicted_flops(), row.predicted_loss()
        rows.append(
            [
                f"64 x {_short(row.active_params)}",
                _short(row.tokens),
                str(row.granularity),
                f"{row.flops:.2e}",
                f"{cost:.2e}",
                f"{cost / row.flops - 1:+.2%}",
                f"{row.loss:.3f}",
                f"{loss:.3f}",
                f"{loss - row.loss:+.3f}",
            ]
        )
    return _table([*header, "loss published", "predicted", "deviation"], rows)


def _search_table() -> str:
    rows = []
    for row in PUBLISHED:
        best = compute_optimal(row.flops)
        sizes = (f"64 x {_short(best.active_params)}", _short(best.total_params))
        chosen = (str(best.blocks), *sizes, _short(best.tokens), f"{best.granularity:g}")
        rows.append([f"{row.flops:.2e}", *chosen, f"{best.loss:.3f}"])
    return _table(["FLOPs", "blocks", "N active", "N total", "D", "G", "loss"], rows)


def _granularity_table() -> str:
    header = ["N active", "D", *(f"G={split}" for split in _SPLIT_BY), "published, first to last"]
    rows = []
    for active, tokens, published in _SPLITS:
        total = total_parameters(blocks_of(active))
        losses = (f"{MOE.loss(total, tokens, split):.3f}" for split in _SPLIT_BY)
        rows.append([f"64 x {_short(active)}", _short(tokens), *losses, published])
    return _table(header, rows)


def _savings_table() -> str:
    rows = ([f"{budget:.0e}", published, f"{saving(budget):.1f}"] for budget, published in _SAVINGS)
    return _table(["FLOPs of the MoE", "published", "predicted"], rows)


# Palette of Okabe and Ito, which colour-blind readers can distinguish.
_COLOURS = ("#0072b2", "#d55e00", "#009e73")
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def figure() -> Figure:
    """Draws both laws: loss against experts (Clark) and against FLOPs (Krajewski)."""
    with matplotlib.rc_context(_STYLE):
        drawn = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = drawn.subplots(1, 2)
        _draw_experts(left)
        _draw_budgets(right)
    return drawn


def _draw_experts(axes: Axes) -> None:
    experts = np.geomspace(1, 512, 100)
    for size, colour in zip(_SIZES, _COLOURS, strict=True):
        name = f"N={_short(size)}"
        axes.plot(experts, S_BASE.loss(size, experts), color=colour, label=f"{name}, S-BASE")
        axes.plot(experts, HASH.loss(size, experts), "--", color=colour, label=f"{name}, HASH")
    axes.set_xscale("log", base=2)
    axes.set_xticks([2**power for power in range(10)], [str(2**power) for power in range(10)])
    axes.set(
        title="Clark et al. 2022, 130B tokens", xlabel="experts", ylabel="loss, nats per token"
    )
    axes.legend(ncols=3, fontsize=8, loc="lower left")
    axes.set_ylim(bottom=1.75)


def _draw_budgets(axes: Axes) -> None:
    budgets = np.geomspace(1e18, 1e26, 60)
    lines = {
        "dense": (DENSE, (1,)),
        "64 experts, G=1": (MOE, (1,)),
        "64 experts, best G": (MOE, GRANULARITIES),
    }
    for colour, (name, (law, choices)) in zip(_COLOURS[::-1], lines.items(), strict=True):
        losses = [compute_optimal(budget, law, choices).loss for budget in budgets]
        axes.plot(budgets, losses, color=colour, label=name)
    published = [(row.flops, row.loss) for row in PUBLISHED]
    axes.plot(
        *zip(*published, strict=True), "o", color="black", markersize=4, label="published optima"
    )
    axes.set_xscale("log")
    axes.set(title="Krajewski et al. 2024, compute-optimal", xlabel="FLOPs of the training")
    axes.set_ylabel("loss, nats per token")
    axes.legend()


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("output", None, "Folder of the figure.", required=True, flag_values=values)


def main(given: flags.FlagValues) -> None:
    """Prints the report and writes the figure to ``output``."""
    output = Path(given.output)
    output.mkdir(parents=True, exist_ok=True)
    print(report())
    drawn = figure()
    with matplotlib.rc_context(_STYLE):
        drawn.savefig(output / "scaling_laws.png", dpi=150)


if __name__ == "__main__":
    common.run(define, main)
