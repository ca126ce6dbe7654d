"""The index of all ablations: ``python -m tools.index``.

The command reads the committed ``experiments/results``. It writes all claims into
``docs/results.md``, chosen claims into ``README.md``, the page ``experiments/results/index.html``
and every ``report.md`` (with ``--figures`` also the figures). Two comments in each page enclose the
written text; the rest of the page stays. ``--check`` writes nothing and fails if a file is out of
date with the results.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2

from moe_jax.ablation.ablation import Ablation, Claim
from moe_jax.ablation.catalogue import RESULTS, CatalogueEntry, Result, results
from moe_jax.ablation.figures import NAMES
from moe_jax.ablation.report import few_seeds, judged, markdown, minutes_of
from moe_jax.ablation.verdicts import MISSING
from moe_jax.errors import ConfigError

ROOT = RESULTS.parents[1]
README, CLAIMS = Path("README.md"), Path("docs/results.md")
BEGIN, END = "<!-- ablations -->", "<!-- /ablations -->"
INDEX = "index.html"
_REPORT = "report.md"
# Rows of README.md: the folder of a result, the text of one of its claims, and the claim as a
# sentence that is clear without context.
CHOSEN = (
    (
        "switch_expert_scaling",
        "16 experts have a lower loss than a dense model",
        "A model with 16 experts has a lower loss than the dense model of equal FLOPs.",
    ),
    (
        "st_moe_capacity",
        "A model trained at 0.75 has a lower loss when evaluated at 2.0",
        "A model trained with capacity factor 0.75 has a lower loss when evaluated with 2.0.",
    ),
    (
        "dropless_capacity",
        "Dropless routing has a lower loss than capacity factor 1",
        "Dropless routing has a lower loss than capacity factor 1.",
    ),
    (
        "deepseek_loss_free",
        "A bias gives a more even load over validation than a balance loss",
        "A bias on the selection gives a lower MaxVio, a more even load, than a balance loss.",
    ),
    (
        "deepseek_bake_off",
        "Switch has a lower loss than a hash router",
        "Switch has a lower loss than a hash router.",
    ),
    (
        "switch_attention_experts",
        "Experts in attention have a lower loss than in feed-forward layers (.024)",
        "Experts in attention give a lower loss than experts in feed-forward layers.",
    ),
    (
        "switch_precision",
        "A router in bfloat16 has a higher loss than a router in float32",
        "A router in bfloat16 has a higher loss than a router in float32.",
    ),
    (
        "expert_choice_capacity",
        "Capacity factor 2 has a lower loss than top-2 token choice",
        "Expert Choice with capacity factor 2 has a lower loss than top-2 routing.",
    ),
)
_HEADER = (
    "| claim | effect | published | measured, 95 % interval | verdict |",
    "|---|---|---|---|---|",
)
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
    """

    claim: str
    effect: str
    published: str
    measured: str
    verdict: str


@dataclasses.dataclass(frozen=True)
class IndexSection:
    """One ablation at one scale.

    Attributes:
        title: Title of the ablation.
        folder: Folder of report and figures, relative to the folder of all results.
        command: Command that reproduces the results.
        minutes: Minutes of all runs.
        seeds: Number of paired seeds.
        scale: Scale of sizes and budgets.
        device: Devices of the runs.
        rows: One row per claim.
        warnings: Warnings to read before the numbers.
        notes: Notes of the ablation.
        figures: Names of the existing figures.
    """

    title: str
    folder: str
    command: str
    minutes: float
    seeds: int
    scale: str
    device: str
    rows: tuple[Row, ...]
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
        folder=result.folder.as_posix(),
        command=result.command,
        minutes=minutes_of(records),
        seeds=len({line["seed"] for line in records}),
        scale=result.scale,
        device=", ".join(dict.fromkeys(line.get("device", "") for line in records)),
        rows=_rows(ablation, records),
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
        return Row(claim.text, effect, str(ablation.effect(claim)), measured, text)

    return tuple(row(claim) for claim in ablation.claims)


def summary(shown: Iterable[IndexSection]) -> str:
    """Returns the number of claims with each verdict, in words."""
    counts = collections.Counter(row.verdict for section in shown for row in section.rows)
    total = sum(counts.values())
    parts = ", ".join(f"{count} {text.split(':')[0]}" for text, count in counts.most_common())
    return f"{total} claims: {parts}." if total else "No result is committed yet."


def waiting(every: Iterable[CatalogueEntry], found: Iterable[Result]) -> list[CatalogueEntry]:
    """Returns the ablations without a result."""
    done = {result.entry.file for result in found}
    return [entry for entry in every if entry.file not in done]


def claims(shown: Sequence[IndexSection], rest: Sequence[CatalogueEntry]) -> str:
    """Returns every claim by ablation, for ``docs/results.md``."""
    lines = [summary(shown), ""]
    lines += [line for section in shown for line in _section_lines(section)]
    if rest:
        lines += ["### Ablations without a result", ""]
        lines += [f"* `{entry.file.as_posix()}`: {entry.ablation.title}" for entry in rest]
        lines += [""]
    return "\n".join(lines)


def _section_lines(section: IndexSection) -> list[str]:
    link = f"../experiments/results/{section.folder}/{_REPORT}"
    about = f"[Report]({link}), {section.seeds} seeds, {section.minutes:.0f} min of run time:"
    remarks = [line for text in (*section.warnings, *section.notes) for line in (text, "")]
    rows = [*_HEADER, *map(_line, section.rows), ""] if section.rows else []
    return [
        f"### {section.title}",
        "",
        f"{about} `{section.command}`",
        "",
        *remarks,
        *rows,
    ]


def chosen(shown: Sequence[IndexSection]) -> str:
    """Returns the claims of ``CHOSEN`` that have a result, for ``README.md``."""
    rows = {
        (section.folder, row.claim): (section, row) for section in shown for row in section.rows
    }
    lines = [
        _chosen_line(sentence, *rows[folder, claim])
        for folder, claim, sentence in CHOSEN
        if (folder, claim) in rows
    ]
    header = ["| claim | published | measured | verdict |", "|---|---|---|---|"]
    return "\n".join([summary(shown), "", *([*header, *lines, ""] if lines else [])])


def _chosen_line(sentence: str, section: IndexSection, row: Row) -> str:
    link = f"experiments/results/{section.folder}/{_REPORT}"
    return f"| [{sentence}]({link}) | {row.published} | {row.measured} | {row.verdict} |"


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
    return template.render(sections=shown, waiting=rest, summary=summary(shown)) + "\n"


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
    tables = {README: chosen(shown), CLAIMS: claims(shown, rest)}
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
