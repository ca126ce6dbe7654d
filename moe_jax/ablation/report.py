"""The report of an ablation: published and measured numbers, curves, effects and verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.ablation import figures
from moe_jax.ablation.ablation import Ablation, Claim, Published
from moe_jax.ablation.derived import (
    DERIVED,
    ENERGY,
    RATIOS,
    Record,
    Records,
    by_arm,
    by_size,
    diverged,
    paired,
    ratio,
    values_of,
    with_thresholds,
)
from moe_jax.ablation.intervals import interval
from moe_jax.ablation.judgement import failed_gates, judged
from moe_jax.ablation.overlay import Overlay
from moe_jax.ablation.pairs import TableAgreement, agreements
from moe_jax.ablation.sizes import WHOLE, QualityBySize
from moe_jax.ablation.statistics import LOOKS
from moe_jax.ablation.verdicts import MISSING, Verdict

# Columns of the table; a metric is left out if no arm has it.
_SHOWN = (
    "loss",
    "train_loss",
    "dropped",
    "eval_dropped",
    "max_violation",
    "eval_violation",
    "load_entropy",
    "excess_loss",
    "mutual_information",
    "purity",
    *DERIVED,
    "compute_multiplier",
)
_FORMATS = {
    "dropped": "{:.1%}",
    "eval_dropped": "{:.1%}",
    "purity": "{:.1%}",
    "tokens_per_second": "{:,.0f}",
    "steps_to": "{:,.0f}",
    "seconds_to": "{:,.1f}",
    "compute_multiplier": "{:.2f}",
}
_ALT = {
    figures.CURVES: "Training loss minus the baseline's by step; below, by step and by seconds",
    figures.AGAINST: "Training loss of every arm against tokens, FLOPs and energy",
    figures.OVERLAY: "Measured and published differences to the first arm",
    figures.SIZES: "Loss by size minus the unchanged model's, beside published scores by size",
    figures.EFFECTS: "Effects with their intervals, beside the published effects",
}


def write_report(ablation: Ablation, records: Records, command: str, folder: Path) -> None:
    """Writes ``report.md`` and its figures as PNG.

    Args:
        ablation: Ablation of the records.
        records: Lines of ``results.jsonl``.
        command: Command that made the records.
        folder: Folder of the report.
    """
    verdicts = judged(ablation, records)
    figures.draw(ablation, records, verdicts, folder)
    (folder / "report.md").write_text(markdown(ablation, records, verdicts, command))


def markdown(
    ablation: Ablation, records: Records, verdicts: Sequence[Verdict], command: str
) -> str:
    """Returns the report as Markdown; arms without records are left out."""
    lines = with_thresholds(ablation, records)
    minutes = minutes_of(records)
    seeds = len({line["seed"] for line in records})
    parts = [
        [f"# {ablation.title}"],
        [f"`{command}`: {len(records)} runs, {seeds} paired seeds, {minutes:.0f} min of run time."],
        made_with(records),
        few_seeds(ablation, records),
        _rule(ablation, lines),
        _measured(ablation, lines),
        *(_published(ablation, lines, paper) for paper in ablation.published),
        *(_agreement(table) for table in agreements(ablation, lines)),
        _overlay(ablation, ablation.overlay, lines) if ablation.overlay else [],
        _sizes(ablation, ablation.sizes, lines) if ablation.sizes else [],
        _verdicts(ablation, records, verdicts),
        [ENERGY] if "energy" in ablation.against else [],
        *([f"![{_ALT[name]}]({name}.png)"] for name in figures.names(ablation, verdicts)),
        _notes(ablation),
    ]
    return "\n".join(line for part in parts if part for line in (*part, ""))


def _rule(ablation: Ablation, records: Records) -> list[str]:
    """Returns the rule of intervals and the failed gates of a registered ablation."""
    if not ablation.registered:
        return ["Intervals are Student's, of 95 %, and no commit registered the claims."]
    looks = ", ".join(f"{1 - look.level:.2%} with {look.seeds} seeds" for look in LOOKS)
    rule = (
        f"Registered at {ablation.registered[:9]}. The intervals of claims and pairs are those of "
        f"the first look that decides ({looks}), with variances pooled over all arms; other "
        "intervals are Student's, of 95 %."
    )
    failed = failed_gates(ablation, records)
    gates = f"{len(ablation.gates) - len(failed)} of {len(ablation.gates)} gates passed."
    return [" ".join([rule, gates, *(f"Failed: {text}." for text in failed)])]


def minutes_of(records: Records) -> float:
    """Returns the minutes of all runs; equal runs count once."""
    return sum({line["config"]: line["seconds"] for line in records}.values()) / 60


def made_with(records: Records) -> list[str]:
    """Returns the commits and versions that trained the runs, if they are recorded."""
    dated = [line for line in records if "commit" in line]
    if not dated:
        return []
    commits = sorted({(line["commit"] or "no commit")[:9] for line in dated})
    versions = sorted({f"{k} {v}" for line in dated for k, v in line["versions"].items()})
    return [f"Trained at {', '.join(commits)} with {', '.join(versions)}."]


def few_seeds(ablation: Ablation, records: Records) -> list[str]:
    """Returns a warning if an arm has fewer seeds than the ablation requires."""
    counts = [len(lines) for lines in by_arm(ablation, records).values()]
    needed = min(ablation.seeds, LOOKS[0].seeds) if ablation.registered else ablation.seeds
    if not counts or min(counts) >= needed:
        return []
    return [
        f"Too few seeds: {min(counts)} of {needed}, so intervals are wide or missing "
        "and no verdict here is final."
    ]


def _measured(ablation: Ablation, records: Records) -> list[str]:
    names = [n for n in dict.fromkeys((ablation.metric, *_SHOWN)) if _any(n, records)]
    arms = by_arm(ablation, records)
    first = next(iter(arms.values()))
    header = ["arm", "parameters", "FLOPs per token", *names, "tokens_per_second", "ratio"]
    rows = []
    for arm, mine in arms.items():
        size, flops = mine[0]["parameters"], mine[0]["flops_per_token"]
        speed = ratio(mine, first, "tokens_per_second")
        means = [_mean(name, mine) for name in (*names, "tokens_per_second")]
        rows.append([arm, f"{size:,}", f"{flops:,}", *means, f"{speed:.2f}" if speed else ""])
    below = (
        "Means over seeds, ± standard deviation; losses in nats per token on validation text. "
        "Runs shared the machine, so the speeds are no benchmark."
    )
    if "train_loss" in names:
        below += (
            " `train_loss`, `dropped`, `max_violation` and `load_entropy` are means over the "
            "second half of training, and `eval_violation` covers the whole validation set. The "
            "violations and the entropy count dropped choices too."
        )
    below += "".join(_divergence(arm, mine) for arm, mine in arms.items())
    if ablation.threshold_arm:
        below += (
            f" `steps_to` and `seconds_to` are the steps and seconds after which the "
            f"{_threshold_loss(records)} stays at or below the final loss of "
            f"`{ablation.threshold_arm}`; they are empty if no run reaches it. "
            f"`compute_multiplier` is all training FLOPs of `{ablation.threshold_arm}` over the "
            "FLOPs until then."
        )
    return [*_table(header, rows), "", below]


def _threshold_loss(records: Records) -> str:
    if any("eval_curve" in line for line in records):
        return "validation loss"
    return "training loss, a mean over a twentieth of the run,"


def _divergence(arm: str, records: Records) -> str:
    steps = {line["seed"]: line["diverged"] for line in records if diverged(line)}
    if not steps:
        return ""
    ends = ", ".join(f"{step} (seed {seed})" for seed, step in steps.items())
    return f" `{arm}` diverged: loss or gradient stayed non-finite after step {ends}."


def _any(name: str, records: Records) -> bool:
    return any(line.get(name) is not None for line in records)


def _mean(name: str, records: Sequence[Record]) -> str:
    values = list(values_of(records, name).values())
    if not values:
        return "diverged" if "loss" in name and all(map(diverged, records)) else ""
    form = _FORMATS.get(name, "{:.4f}")
    deviation = len(values) > 1 and "loss" in name
    spread = f" ± {np.std(values, ddof=1):.4f}" if deviation else ""
    reached = f" ({len(values)} of {len(records)} seeds)" if len(values) < len(records) else ""
    return form.format(float(np.mean(values))) + spread + reached


def _published(ablation: Ablation, records: Records, paper: Published) -> list[str]:
    """Returns published and measured values, both relative to the first arm of the paper."""
    arms = by_arm(ablation, records)
    both = [arm for arm in arms if arm in paper.values]
    if not both:
        return []
    metric = paper.measures or ablation.metric
    first, by_ratio = both[0], metric in RATIOS
    relation = "/" if by_ratio else "-"
    header = ["arm", "published", f"{relation} {first}", "measured here", f"{relation} {first}"]
    rows = []
    for arm in both:
        theirs = _relation(paper.measured[arm], paper.measured[first], by_ratio)
        ours = _related(arms[arm], arms[first], metric, by_ratio)
        compared = ["", ""] if arm == first else [theirs, ours]
        mean = _mean(metric, arms[arm])
        rows.append([arm, f"{paper.values[arm]:g}", compared[0], mean, compared[1]])
    sign = " Differences have the sign of a loss." if paper.negated else ""
    other = "" if paper.measures else f" The runs measure `{metric}`, another quantity."
    about = f"{paper.source}, {paper.scale}: {paper.metric}, beside `{metric}`.{sign}{other}"
    return [about, "", *_table(header, rows)]


def _agreement(table: TableAgreement) -> list[str]:
    """Returns every pair of arms of a printed table."""
    header = ["lower in the paper", "higher", "published", "measured, interval", "pair"]
    rows = [
        [pair.low, pair.high, f"{pair.published:+.4g}", str(pair.measured), reading]
        for pair, reading in table.readings.items()
    ]
    tau = "" if table.tau is None else f" Kendall's tau is {table.tau:.2f}."
    about = (
        f"Every pair of arms that {table.paper.source} prints: {table.counts}.{tau} The slope of "
        f"measured against printed numbers is {table.slope:.2f}."
    )
    return [about, "", *_table(header, rows)]


def _relation(ours: float, theirs: float, by_ratio: bool) -> str:
    return f"{ours / theirs:.2f}" if by_ratio else f"{ours - theirs:+.4g}"


def _related(ours: Records, theirs: Records, metric: str, by_ratio: bool) -> str:
    if by_ratio:
        found = ratio(ours, theirs, metric)
        return "" if found is None else f"{found:.2f}"
    return str(paired(ours, theirs, metric) or "")


def _overlay(ablation: Ablation, overlay: Overlay, records: Records) -> list[str]:
    arms = by_arm(ablation, records)
    if overlay.first not in arms:
        return []
    names = [*overlay.series, *overlay.laws]
    rows = []
    for arm in [arm for arm in overlay.places if arm in arms and arm != overlay.first]:
        place = overlay.places[arm]
        expected = ["" if v is None else f"{v:+.3f}" for v in overlay.expected(place).values()]
        ours = paired(arms[arm], arms[overlay.first], ablation.metric)
        rows.append([arm, f"{place:g}", str(ours or ""), *expected])
    header = ["arm", overlay.label, "measured", *names]
    about = f"Loss minus the loss of `{overlay.first}`; losses on different corpora do not compare."
    fitted = _coefficients(ablation, overlay, records)
    return [about, "", *_table(header, rows), *(["", *fitted] if fitted else [])]


def _coefficients(ablation: Ablation, overlay: Overlay, records: Records) -> list[str]:
    """Returns a table of coefficients of laws, fitted to each seed that has every arm."""
    seeds = _complete_seeds(ablation, overlay.places, records)
    if not overlay.coefficients or len(seeds) < 2:
        return []
    places = list(overlay.places.values())
    rows = []
    for coefficient in overlay.coefficients:
        values = [coefficient.fit(places, losses) for losses in seeds]
        measured = interval(values)
        rows.append(
            [coefficient.name, coefficient.source, f"{coefficient.published:.3g}", str(measured)]
        )
    about = f"Coefficients of laws, fitted to each of the {len(seeds)} seeds that have every arm."
    return [about, "", *_table(["coefficient", "source", "published", "measured"], rows)]


def _complete_seeds(ablation: Ablation, arms: Iterable[str], records: Records) -> list[list[float]]:
    """Returns the losses of the arms, in their order, for each seed that has all of them."""
    known: dict[int, dict[str, float]] = {}
    for line in records:
        if line.get(ablation.metric) is not None:
            known.setdefault(line["seed"], {})[line["arm"]] = line[ablation.metric]
    wanted = list(arms)
    return [
        [losses[arm] for arm in wanted]
        for _, losses in sorted(known.items())
        if losses.keys() >= set(wanted)
    ]


def _sizes(ablation: Ablation, sizes: QualityBySize, records: Records) -> list[str]:
    """Returns a table of measured differences and a table of published scores, by size."""
    about = "Quality against size, the share of the bytes of the unchanged model's experts."
    tables = (_measured_sizes(ablation, sizes, records), _published_sizes(sizes))
    return [about, *(line for table in tables if table for line in ("", *table))]


def _measured_sizes(ablation: Ablation, sizes: QualityBySize, records: Records) -> list[str]:
    rows = [
        [name, f"{size:.2f}", series.arms[size], series.reference, effect]
        for name, series in sizes.measured.items()
        for size, effect in by_size(ablation, series, records).items()
    ]
    header = ["measured here", "size", "arm", "unchanged model", f"difference in {ablation.metric}"]
    return _table(header, rows) if rows else []


def _published_sizes(sizes: QualityBySize) -> list[str]:
    rows = []
    for name, series in sizes.published.items():
        whole = f"{series.scores[WHOLE]:.4g}"
        for size, share in sorted(series.relative.items()):
            score = f"{series.scores[size]:.4g}"
            if size != WHOLE:
                rows.append([name, f"{size:.2f}", score, whole, f"{share:.3f}", series.source])
    header = ["published", "size", "score", "unchanged model", "score / unchanged", "source"]
    return _table(header, rows) if rows else []


def _verdicts(ablation: Ablation, records: Records, verdicts: Sequence[Verdict]) -> list[str]:
    """Returns the claims; a registered ablation has its own exploratory claims apart."""
    ours = [claim for claim in ablation.claims if ablation.registered and claim.ours]
    papers = [claim for claim in ablation.claims if claim not in ours]
    lines = _claims(ablation, papers, records, verdicts) if papers else []
    if ours:
        lines += ["", "Exploratory claims, which no paper makes:", ""]
        lines += _claims(ablation, ours, records, verdicts)
    return lines


def _claims(
    ablation: Ablation, claims: Sequence[Claim], records: Records, verdicts: Sequence[Verdict]
) -> list[str]:
    found = {verdict.claim: verdict for verdict in verdicts}
    header = ["claim", "effect", "published", "measured, interval", "verdict"]
    # The verdict uses unseen validation text; the training loss covers more text, partly seen.
    twice = _any("train_loss", records) and any(c.metric == "loss" for c in ablation.claims)
    header += ["in training loss"] if twice else []
    rows = []
    for claim in claims:
        verdict = found.get(claim)
        effect = verdict.measured if verdict else ""
        text = f"**{verdict.text}**" if verdict else MISSING
        what = f"{claim.metric}: {claim.high} - {claim.low}"
        row = [claim.text, what, str(ablation.effect(claim)), effect, text]
        rows.append(row + ([_in_training(claim, records)] if twice else []))
    return _table(header, rows)


def _in_training(claim: Claim, records: Records) -> str:
    if claim.metric != "loss":
        return ""
    high, low = ([r for r in records if r["arm"] == arm] for arm in (claim.high, claim.low))
    return str(paired(high, low, "train_loss") or "")


def _notes(ablation: Ablation) -> list[str]:
    if not ablation.notes:
        return []
    return ["Notes:", "", *(f"* {note}" for note in ablation.notes)]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]
