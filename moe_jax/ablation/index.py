"""The index of all ablations: ``python -m tools.index``.

Reads the committed ``experiments/results`` and writes all claims into ``docs/results.md``, chosen
ones into ``README.md``, the page ``experiments/results/index.html`` and every ``report.md`` (with
``--figures`` its figures too). Pages keep their text outside two comments. ``--check`` writes
nothing and fails if a file differs from the one that the results give.
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

ROOT = RESULTS.parents[1]
README, CLAIMS = Path("README.md"), Path("docs/results.md")
BEGIN, END = "<!-- ablations -->", "<!-- /ablations -->"
INDEX = "index.html"
_REPORT = "report.md"
# The rows of README.md: the folder of a result, the words of one of its claims, and the claim in a
# sentence that can be read alone.
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
        "A router in bfloat16 has a higher loss than one in float32",
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
        figures=tuple(f"{name}.png" for name in NAMES if (there / f"{name}.png").exists()),
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


def claims(shown: Sequence[Section], rest: Sequence[Entry]) -> str:
    """Returns every claim by ablation, for ``docs/results.md``."""
    lines = [summary(shown), ""]
    lines += [line for section in shown for line in _section_lines(section)]
    if rest:
        lines += ["### Ablations without a result", ""]
        lines += [f"* `{entry.file.as_posix()}`: {entry.ablation.title}" for entry in rest]
        lines += [""]
    return "\n".join(lines)


def _section_lines(section: Section) -> list[str]:
    link = f"../experiments/results/{section.folder}/{_REPORT}"
    about = f"[Report]({link}), {section.seeds} seeds, {section.minutes:.0f} min of runs:"
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


def chosen(shown: Sequence[Section]) -> str:
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


def _chosen_line(sentence: str, section: Section, row: Row) -> str:
    link = f"experiments/results/{section.folder}/{_REPORT}"
    return f"| [{sentence}]({link}) | {row.published} | {row.measured} | {row.verdict} |"


def _line(row: Row) -> str:
    return f"| {row.claim} | `{row.effect}` | {row.published} | {row.measured} | {row.verdict} |"


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


def put(page: str, text: str, name: Path) -> str:
    """Returns a page with the text between its two comments replaced.

    Args:
        page: the whole page.
        text: its new table.
        name: of the page, for the message.

    Raises:
        ConfigError: if the two comments are not there.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{name} has no {BEGIN} and {END}: put them where the table belongs")
    return f"{before}{begin}\n{text}{end}{after}"


def made(every: Sequence[Entry], folder: Path, root: Path) -> dict[Path, str]:
    """Returns every file that the results give, and its text.

    Args:
        every: the ablations.
        folder: of all results.
        root: folder of ``README.md`` and ``docs/results.md``.
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
    """Returns the files that do not have their text."""
    return [path for path, text in files.items() if not path.exists() or path.read_text() != text]
