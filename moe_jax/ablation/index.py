"""The index of all ablations: ``python -m tools.index``.

The command reads the committed ``experiments/results``. It writes every printed table and all
claims into ``docs/results.md``, a row per printed table into ``README.md``, the page
``experiments/results/index.html`` and every ``report.md`` (with ``--figures`` also the figures).
Two comments in each page enclose the written text; the rest of the page stays. ``--check`` writes
nothing and fails if a file is out of date with the results.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2

from moe_jax.ablation.ablation import Ablation, Claim
from moe_jax.ablation.catalogue import RESULTS, CatalogueEntry, Result, results
from moe_jax.ablation.derived import with_thresholds
from moe_jax.ablation.figures import NAMES
from moe_jax.ablation.judgement import judged
from moe_jax.ablation.pairs import READINGS, TableAgreement, agreements
from moe_jax.ablation.report import few_seeds, markdown, minutes_of
from moe_jax.ablation.verdicts import MISSING, UNTESTABLE
from moe_jax.errors import ConfigError

ROOT = RESULTS.parents[1]
README, CLAIMS = Path("README.md"), Path("docs/results.md")
BEGIN, END = "<!-- ablations -->", "<!-- /ablations -->"
INDEX = "index.html"
_REPORT = "report.md"
# Smallest number of testable pairs of a table in README.md; ``docs/results.md`` has every table.
_PAIRS = 3
_TABLES = (
    "| published table | seeds | pairs of its arms | Kendall's tau | slope |",
    "|---|---|---|---|---|",
)
_HEADER = (
    "| claim | effect | published | measured, interval | verdict |",
    "|---|---|---|---|---|",
)
_EXPLORATORY = "No commit registered these claims before the runs: they are exploratory."
_OUTDATED = "Outdated: the configuration has changed since; the command trains another model."


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of both tables: a claim and its verdict.

    Attributes:
        claim: Claim in words, with its source.
        effect: Metric and the two arms whose difference is the effect.
        published: Published effect.
        measured: Measured effect, with its interval.
        verdict: Verdict in words.
        registered: Whether a commit registered the claim, which a paper makes, before the runs.
    """

    claim: str
    effect: str
    published: str
    measured: str
    verdict: str
    registered: bool


@dataclasses.dataclass(frozen=True)
class IndexSection:
    """One ablation at one scale.

    Attributes:
        title: Title of the ablation.
        paper: Paper of the ablation, by the folder of its file.
        folder: Folder of report and figures, relative to the folder of all results.
        command: Command that reproduces the results.
        minutes: Minutes of all runs.
        seeds: Number of paired seeds.
        scale: Scale of sizes and budgets.
        device: Devices of the runs.
        rows: One row per claim.
        tables: Agreement with each printed table that the runs measure too.
        registered: Commit that registered the claims; "" for claims that no commit registered.
        warnings: Warnings to read before the numbers.
        notes: Notes of the ablation.
        figures: Names of the existing figures.
    """

    title: str
    paper: str
    folder: str
    command: str
    minutes: float
    seeds: int
    scale: str
    device: str
    rows: tuple[Row, ...]
    tables: tuple[TableAgreement, ...]
    registered: str
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    figures: tuple[str, ...]


def sections(found: Iterable[Result], folder: Path = RESULTS) -> list[IndexSection]:
    """Returns the section of each result; ``folder`` holds the figures."""
    return [_section(result, folder) for result in found]


def _section(result: Result, folder: Path) -> IndexSection:
    ablation, records = result.entry.ablation, result.records
    report = folder / result.folder
    warnings = few_seeds(ablation, records) + ([_OUTDATED] if result.outdated else [])
    return IndexSection(
        title=ablation.title,
        paper=result.entry.file.parent.name,
        folder=result.folder.as_posix(),
        command=result.command,
        minutes=minutes_of(records),
        seeds=len({line["seed"] for line in records}),
        scale=result.scale,
        device=", ".join(dict.fromkeys(line.get("device", "") for line in records)),
        rows=_rows(ablation, records),
        tables=tuple(agreements(ablation, with_thresholds(ablation, records))),
        registered=ablation.registered,
        warnings=tuple(warnings),
        notes=ablation.notes,
        figures=tuple(f"{name}.png" for name in NAMES if (report / f"{name}.png").exists()),
    )


def _rows(ablation: Ablation, records: Sequence[dict]) -> tuple[Row, ...]:
    verdicts = {found.claim: found for found in judged(ablation, records)}

    def row(claim: Claim) -> Row:
        verdict = verdicts.get(claim)
        effect = f"{claim.metric}: {claim.high} - {claim.low}"
        measured = verdict.measured if verdict else ""
        text = verdict.text if verdict else MISSING
        registered = bool(ablation.registered) and not claim.ours
        return Row(claim.text, effect, str(ablation.effect(claim)), measured, text, registered)

    return tuple(row(claim) for claim in ablation.claims)


def summary(shown: Iterable[IndexSection]) -> str:
    """Returns the number of claims with each verdict, in words, exploratory claims apart."""
    rows = [row for section in shown for row in section.rows]
    if not rows:
        return "No result is committed yet."
    kinds = {
        "registered": [row.verdict for row in rows if row.registered],
        "exploratory": [row.verdict for row in rows if not row.registered],
    }
    return " ".join(_counted(kind, verdicts) for kind, verdicts in kinds.items() if verdicts)


def _counted(kind: str, verdicts: Sequence[str]) -> str:
    counts = collections.Counter(text.split(":")[0] for text in verdicts)
    parts = ", ".join(f"{count} {text}" for text, count in counts.most_common())
    return f"{len(verdicts)} {kind} claims: {parts}."


def waiting(every: Iterable[CatalogueEntry], found: Iterable[Result]) -> list[CatalogueEntry]:
    """Returns the ablations without a result."""
    done = {result.entry.file for result in found}
    return [entry for entry in every if entry.file not in done]


def claims(shown: Sequence[IndexSection], rest: Sequence[CatalogueEntry]) -> str:
    """Returns every claim by ablation, for ``docs/results.md``."""
    root = "../experiments/results"
    lines = [pairs(shown, 0, root), summary(shown), ""]
    lines += [line for section in shown for line in _section_lines(section)]
    if rest:
        lines += ["### Ablations without a result", ""]
        lines += [f"* `{entry.file.as_posix()}`: {entry.ablation.title}" for entry in rest]
        lines += [""]
    return "\n".join(lines)


def _section_lines(section: IndexSection) -> list[str]:
    link = f"../experiments/results/{section.folder}/{_REPORT}"
    about = f"[Report]({link}), {section.seeds} seeds, {section.minutes:.0f} min of run time:"
    kind = (
        f"Claims registered at {section.registered[:9]}; those marked (ours) are exploratory."
        if section.registered
        else _EXPLORATORY
    )
    remarks = [line for text in (*section.warnings, *section.notes) for line in (text, "")]
    rows = [*_HEADER, *map(_line, section.rows), ""] if section.rows else []
    return [
        f"### {section.title}",
        "",
        f"{about} `{section.command}`",
        "",
        *([kind, ""] if section.rows else []),
        *remarks,
        *rows,
    ]


def pairs(shown: Sequence[IndexSection], fewest: int, root: str) -> str:
    """Returns a row per printed table, and the sums over all printed tables.

    Args:
        shown: Sections of all results.
        fewest: Smallest number of testable pairs that a table in a row has.
        root: Path to ``experiments/results`` from the page.
    """
    tables = [(section, table) for section in shown for table in section.tables]
    if not tables:
        return ""
    counts = collections.Counter(text for _, table in tables for text in table.readings.values())
    parts = ", ".join(f"{counts[kind]} {kind}" for kind in READINGS if counts[kind])
    total = f"{sum(counts.values())} pairs of arms in {len(tables)} published tables: {parts}."
    rows = [
        _table_line(section, table, root)
        for section, table in tables
        if sum(text != UNTESTABLE for text in table.readings.values()) >= fewest
    ]
    return "\n".join([total, "", *_TABLES, *rows, ""])


def _table_line(section: IndexSection, table: TableAgreement, root: str) -> str:
    tau = "" if table.tau is None else f"{table.tau:.2f}"
    link = f"[{table.paper.source}]({root}/{section.folder}/{_REPORT})"
    seeds = f"{section.seeds}{', registered' if section.registered else ''}"
    return f"| {link} | {seeds} | {table.counts} | {tau} | {table.slope:.2f} |"


def _line(row: Row) -> str:
    return f"| {row.claim} | `{row.effect}` | {row.published} | {row.measured} | {row.verdict} |"


def page(shown: Sequence[IndexSection], rest: Sequence[CatalogueEntry]) -> str:
    """Returns the page as HTML; it loads nothing from other hosts."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("index.html.j2")
    tables = [(section, table) for section in shown for table in section.tables]
    verdicts = sorted({row.verdict.split(":")[0] for section in shown for row in section.rows})
    text = template.render(
        sections=shown, waiting=rest, summary=summary(shown), tables=tables, verdicts=verdicts
    )
    return text + "\n"


def put(page: str, text: str, name: Path) -> str:
    """Returns a page with the text between its two comments replaced.

    Args:
        page: Text of the whole page.
        text: New text between the comments.
        name: Name of the page, for the message.

    Raises:
        ConfigError: The page lacks one of the two comments.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{name} has no {BEGIN} and {END}: put them where the table belongs")
    return f"{before}{begin}\n{text}{end}{after}"


def made(every: Sequence[CatalogueEntry], folder: Path, root: Path) -> dict[Path, str]:
    """Returns the text of every file that is written from the results.

    Args:
        every: All ablations.
        folder: Folder of all results.
        root: Folder of ``README.md`` and ``docs/results.md``.
    """
    found = results(every, folder)
    shown, rest = sections(found, folder), waiting(every, found)
    rows = pairs(shown, _PAIRS, "experiments/results")
    tables = {README: rows or summary(shown) + "\n", CLAIMS: claims(shown, rest)}
    return {
        **{root / name: put((root / name).read_text(), tables[name], name) for name in tables},
        folder / INDEX: page(shown, rest),
        **{folder / result.folder / _REPORT: _report(result) for result in found},
    }


def _report(result: Result) -> str:
    ablation, records = result.entry.ablation, result.records
    return markdown(ablation, records, judged(ablation, records), result.command)


def outdated(files: dict[Path, str]) -> list[Path]:
    """Returns the files whose text differs from ``files``."""
    return [path for path, text in files.items() if not path.exists() or path.read_text() != text]
