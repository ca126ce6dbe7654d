"""The report of an ablation: published beside measured, curves, effects and verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.ablation import Ablation
from experiments.verdicts import Verdict, judge

Records = Sequence[dict[str, Any]]
_SHOWN = ("loss", "dropped", "max_violation", "tokens_per_second")
_FORMATS = {"dropped": "{:.1%}", "tokens_per_second": "{:,.0f}"}


def write_report(ablation: Ablation, records: Records, command: str, folder: Path) -> None:
    """Writes ``report.md`` and the figures ``curves`` and ``effects`` as PNG and SVG.

    Args:
        ablation: the ablation.
        records: lines of ``results.jsonl``.
        command: that made them.
        folder: where to.
    """
    verdicts = [found for claim in ablation.claims if (found := judge(claim, records))]
    _save(_curves(ablation, records), folder / "curves")
    if verdicts:
        _save(_effects(verdicts), folder / "effects")
    (folder / "report.md").write_text(markdown(ablation, records, verdicts, command))


def markdown(
    ablation: Ablation, records: Records, verdicts: Sequence[Verdict], command: str
) -> str:
    """Returns the report; arms that did not run are left out."""
    seeds = len({line["seed"] for line in records})
    seconds = sum(line["seconds"] for line in records)
    return "\n".join(
        [
            f"# {ablation.title}",
            "",
            f"`{command}`: {len(records)} runs with {seeds} paired seeds, {seconds / 60:.0f} min.",
            "",
            *_measured(ablation, records),
            "",
            *_published(ablation, records),
            *_verdicts(verdicts),
            "![Training loss of every arm, mean and range over seeds](curves.svg)",
            "",
            *(["![Effects with their intervals](effects.svg)", ""] if verdicts else []),
        ]
    )


def _measured(ablation: Ablation, records: Records) -> list[str]:
    names = dict.fromkeys((ablation.metric, *_SHOWN))
    lines = [
        f"| arm | parameters | FLOPs per token | {' | '.join(names)} |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for arm, mine in _by_arm(ablation, records).items():
        values = (_mean(name, mine) for name in names)
        size, flops = mine[0]["parameters"], mine[0]["flops_per_token"]
        lines.append(f"| {arm} | {size:,} | {flops:,} | {' | '.join(values)} |")
    return [*lines, "", "Means over seeds; loss in nats per token on validation text."]


def _mean(name: str, records: Records) -> str:
    values = [line[name] for line in records]
    form = _FORMATS.get(name, "{:.4f}")
    spread = f" ± {np.std(values, ddof=1):.4f}" if name == "loss" and len(values) > 1 else ""
    return form.format(float(np.mean(values))) + spread


def _published(ablation: Ablation, records: Records) -> list[str]:
    lines = []
    for paper in ablation.published:
        lines += [
            f"{paper.source}, {paper.scale}: {paper.metric}.",
            "",
            "| arm | published | measured here |",
            "|---|---|---|",
        ]
        for arm, mine in _by_arm(ablation, records).items():
            value = paper.values.get(arm)
            said = "" if value is None else f"{value:g}"
            lines.append(f"| {arm} | {said} | {_mean(ablation.metric, mine)} |")
        lines.append("")
    return lines


def _verdicts(verdicts: Sequence[Verdict]) -> list[str]:
    if not verdicts:
        return []
    lines = [
        "| claim | metric | effect (high - low), 95 % interval | verdict |",
        "|---|---|---|---|",
    ]
    for found in verdicts:
        claim = found.claim
        lines.append(f"| {claim.text} | {claim.metric} | {found.effect} | **{found.text}** |")
    return [*lines, ""]


def _by_arm(ablation: Ablation, records: Records) -> dict[str, list[dict[str, Any]]]:
    found = {arm: [line for line in records if line["arm"] == arm] for arm in ablation.arms}
    return {arm: mine for arm, mine in found.items() if mine}


def _curves(ablation: Ablation, records: Records) -> Figure:
    figure, axes = _figure()
    for arm, mine in _by_arm(ablation, records).items():
        steps = [step for step, _ in mine[0]["curve"]]
        losses = np.array([[loss for _, loss in line["curve"]] for line in mine])
        (drawn,) = axes.plot(steps, losses.mean(0), label=arm, linewidth=1.4)
        axes.fill_between(
            steps, losses.min(0), losses.max(0), color=drawn.get_color(), alpha=0.15, linewidth=0
        )
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats per token)")
    axes.legend(frameon=False)
    return figure


def _effects(verdicts: Sequence[Verdict]) -> Figure:
    figure, axes = _figure()
    for row, found in enumerate(reversed(verdicts)):
        mean, half = found.effect.mean, found.effect.half_width
        axes.errorbar(mean, row, xerr=half, fmt="o", color="#0072b2", capsize=3)
        axes.plot([found.claim.margin] * 2, [row - 0.3, row + 0.3], color="#d55e00", linewidth=1.4)
    names = [f"{found.claim.high} - {found.claim.low}" for found in reversed(verdicts)]
    axes.set_yticks(range(len(names)), names)
    axes.axvline(0.0, color="#888888", linewidth=0.8)
    axes.set_xlabel("effect, and the margin claimed")
    return figure


def _figure() -> tuple[Figure, Axes]:
    figure = Figure((8.0, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path.with_suffix(".png"), dpi=110)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
