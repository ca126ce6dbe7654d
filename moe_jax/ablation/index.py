"""The index of all ablations: ``python -m tools.index``.

Reads what is committed in ``experiments/results`` and writes the table between two comments of
``README.md``, the page ``experiments/results/index.html`` and every ``report.md`` anew (with
``--figures`` its figures too). ``--check`` writes nothing, and fails if any of them is not what the
results give.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2

from moe_jax.ablation.ablation import Ablation, Claim
from moe_jax.ablation.catalogue import RESULTS, Entry, Result, results
from moe_jax.ablation.figures import NAMES
from moe_jax.ablation.report import few_seeds, judged, markdown, minutes_of
from moe_jax.ablation.verdicts import MISSING
from moe_jax.errors import ConfigError

README = RESULTS.parents[1] / "README.md"
BEGIN, END = "<!-- ablations -->", "<!-- /ablations -->"
INDEX = "index.html"
_REPORT = "report.md"
_OUTDATED = "Outdated: the configuration has changed since; the command trains another one."


@dataclasses.dataclass(frozen=True)
class Row:
    """A claim as both tables show it.

    Attributes:
        claim: in words, with its source.
        effect: what is subtracted from what.
        published: the paper's number.
        measured: ours, with its interval.
        verdict: the verdict.
    """

    claim: str
    effect: str
    published: str
    measured: str
    verdict: str


@dataclasses.dataclass(frozen=True)
class Section:
    """One ablation at one scale.

    Attributes:
        title: of the ablation.
        folder: of its report and figures, relative to that of all results.
        command: that makes the results.
        minutes: that the runs took.
        seeds: paired ones.
        scale: of sizes and budgets.
        device: what it ran on.
        rows: one per claim.
        warnings: what a reader must know before the numbers.
        notes: the ablation's.
        figures: files that are there.
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


def sections(found: Iterable[Result], folder: Path = RESULTS) -> list[Section]:
    """Returns what the index shows of each result, read from ``folder``."""
    return [_section(result, folder) for result in found]


def _section(result: Result, folder: Path) -> Section:
    ablation, records = result.entry.ablation, result.records
    there = folder / result.folder
    warnings = few_seeds(ablation, records) + ([_OUTDATED] if result.outdated else [])
    return Section(
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
        figures=tuple(f"{name}.svg" for name in NAMES if (there / f"{name}.svg").exists()),
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


def summary(shown: Iterable[Section]) -> str:
    """Returns how many claims have which verdict."""
    counts = collections.Counter(row.verdict for section in shown for row in section.rows)
    total = sum(counts.values())
    parts = ", ".join(f"{count} {text.split(':')[0]}" for text, count in counts.most_common())
    return f"{total} claims: {parts}." if total else "No result is committed yet."


def waiting(every: Iterable[Entry], found: Iterable[Result]) -> list[Entry]:
    """Returns the ablations without a result."""
    done = {result.entry.file for result in found}
    return [entry for entry in every if entry.file not in done]


def table(shown: Sequence[Section], rest: Sequence[Entry]) -> str:
    """Returns what stands between the two comments of README.md."""
    lines = [summary(shown), ""]
    if shown:
        lines += [
            "| claim | effect | published | measured, 95 % interval | verdict |",
            "|---|---|---|---|---|",
        ]
        lines += [line for section in shown for line in _table_rows(section)]
        lines += [""]
    if rest:
        lines += [
            "Runnable, without a verdict yet (`moe-jax ablate --ablation=FILE`):",
            "",
        ]
        lines += [f"* `{entry.file.as_posix()}`: {entry.ablation.title}" for entry in rest]
        lines += [""]
    return "\n".join(lines)


def _table_rows(section: Section) -> list[str]:
    link = f"experiments/results/{section.folder}/{_REPORT}"
    about = (
        f"**[{section.title}]({link})**, {section.seeds} seeds, {section.minutes:.0f} min of runs: "
        f"`{section.command}`"
    )
    extra = " ".join([*section.warnings, *section.notes])
    head = f"| {about}{' ' + extra if extra else ''} | | | | |"
    rows = [
        f"| {row.claim} | `{row.effect}` | {row.published} | {row.measured} | {row.verdict} |"
        for row in section.rows
    ]
    return [head, *rows]


def page(shown: Sequence[Section], rest: Sequence[Entry]) -> str:
    """Returns the page, which asks no other host for anything."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("index.html.j2")
    return template.render(sections=shown, waiting=rest, summary=summary(shown)) + "\n"


def put(readme: str, text: str) -> str:
    """Returns README.md with its table replaced.

    Raises:
        ConfigError: if the two comments are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"README.md has no {BEGIN} and {END}: put them where the table belongs")
    return f"{before}{begin}\n{text}{end}{after}"


def made(every: Sequence[Entry], folder: Path, readme: Path) -> dict[Path, str]:
    """Returns every file that the results give, and its text."""
    found = results(every, folder)
    shown, rest = sections(found, folder), waiting(every, found)
    return {
        readme: put(readme.read_text(), table(shown, rest)),
        folder / INDEX: page(shown, rest),
        **{folder / result.folder / _REPORT: _report(result) for result in found},
    }


def _report(result: Result) -> str:
    ablation, records = result.entry.ablation, result.records
    return markdown(ablation, records, judged(ablation, records), result.command)


def outdated(files: dict[Path, str]) -> list[Path]:
    """Returns the files that do not have their text."""
    return [path for path, text in files.items() if not path.exists() or path.read_text() != text]
