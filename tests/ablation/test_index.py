import dataclasses
import json
import re
from pathlib import Path

import pytest

from moe_jax.ablation.catalogue import (
    RESULTS,
    CatalogueEntry,
    Result,
    command_of,
    entries,
    read,
    results,
)
from moe_jax.ablation.derived import DERIVED
from moe_jax.ablation.index import (
    BEGIN,
    CLAIMS,
    END,
    README,
    ROOT,
    made,
    outdated,
    put,
    sections,
    summary,
)
from moe_jax.ablation.records import METRICS
from moe_jax.ablation.report import markdown
from moe_jax.errors import ConfigError
from tests import browser
from tests.ablation.records import FULL, records

ENTRY = CatalogueEntry(Path("experiments/paper/full.py"), FULL)
OTHER = CatalogueEntry(
    Path("experiments/paper/other.py"), dataclasses.replace(FULL, name="other", title="Other")
)


@pytest.fixture(scope="module")
def every():
    return entries()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in (README, CLAIMS):
        (tmp_path / name).write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return tmp_path


def write(folder, name, lines):
    there = folder / name
    there.mkdir(parents=True, exist_ok=True)
    (there / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (there / "curves.png").write_bytes(b"")


def written(folder, every=(ENTRY, OTHER)):
    files = made(every, folder, folder)
    for path, text in files.items():
        path.write_text(text)
    assert not outdated(made(every, folder, folder))
    return (folder / CLAIMS).read_text(), (folder / "index.html").read_text()


def test_the_repository_shows_what_its_results_give(every):
    assert not outdated(made(every, RESULTS, ROOT)), "run python -m tools.index"


def test_the_readme_has_a_row_for_each_table_and_at_most_twelve():
    text = (ROOT / README).read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert 0 < len(rows) <= 12
    assert "discordant" in text.splitlines()[1]


def test_every_claim_names_a_metric_and_every_ablation_another_folder(every):
    names = [entry.ablation.name for entry in every]
    assert len(names) == len(set(names))
    known = {*METRICS, *DERIVED}
    for entry in every:
        assert {claim.metric for claim in entry.ablation.claims} <= known, entry.file
        assert {paper.measures for paper in entry.ablation.published} <= known | {None}, entry.file
        timed = any(claim.metric in DERIVED for claim in entry.ablation.claims)
        assert bool(entry.ablation.threshold_arm) >= timed, entry.file


def test_results_and_what_waits_for_them(folder):
    write(folder, "tiny", records())
    claims_page, page = written(folder)
    assert claims_page.startswith("before\n") and claims_page.endswith("after\n")
    assert "old" not in claims_page
    claims = "4 exploratory claims: 2 reproduced, 1 contradicted, 1 no verdict."
    command = (
        "moe-jax ablate --ablation=paper/full --scale=cpu --seeds=3 "
        "--output=experiments/results/tiny"
    )
    for text in (claims_page, page):
        assert claims in text
        assert command in text
        assert "+1.0033 ± 0.0143" in text
        assert "+0.2, A paper, table 1" in text
        assert "9 min of run time" in text
        assert "A longer run says the same." in text
        assert "experiments/paper/other.py" in text
    assert "| Switch is better | `loss: dense - switch` |" in claims_page
    assert "(../experiments/results/tiny/report.md)" in claims_page
    assert '<img src="tiny/curves.png"' in page
    assert "effects.png" not in page  # it is not there
    assert "| switch | -1.5 |" in (folder / "tiny" / "report.md").read_text()


def test_a_changed_result_is_noticed(folder):
    write(folder, "tiny", records())
    written(folder)
    path = folder / "tiny" / "results.jsonl"
    path.write_text(path.read_text().replace('"loss": 2.0', '"loss": 2.5'))
    wrong = outdated(made((ENTRY, OTHER), folder, folder))
    assert {path.name for path in wrong} == {"results.md", "index.html", "report.md"}


def test_the_readme_shows_tables_of_three_pairs(folder):
    write(folder, "tiny", records())
    claims_page, page = written(folder)
    # Two arms are one pair, which only the page of all results shows.
    total = "1 pairs of arms in 1 published tables: 1 concordant.\n"
    row = "experiments/results/tiny/report.md) | 3 | 1 concordant |  | 5.02 |"
    readme = (folder / README).read_text()
    assert total in readme and row not in readme
    assert total in claims_page and f"| [A paper, table 1](../{row}" in claims_page
    assert "Every pair of arms" in page
    report = (folder / "tiny" / "report.md").read_text()
    assert "| switch | dense | +0.2 | +1.0033 ± 0.0143 | concordant |" in report


def test_claims_say_whether_they_were_registered(folder):
    write(folder, "tiny", records())
    assert "they are exploratory" in written(folder)[0]
    known = dataclasses.replace(FULL, registered="0123456789abcdef")
    claims_page, _ = written(folder, (dataclasses.replace(ENTRY, ablation=known),))
    assert "Claims registered at 012345678; " in claims_page


def test_other_scales_stand_beside(folder):
    write(folder, "tiny", records())
    write(folder, "tiny/gpu", [{**line, "scale": "gpu"} for line in records()])
    claims_page, _ = written(folder)
    assert "--scale=gpu --seeds=3 --output=experiments/results/tiny/gpu`" in claims_page
    assert "8 exploratory claims: 4 reproduced" in claims_page
    # Batches are larger at that scale than in these records.
    assert claims_page.count("Outdated: ") == 1


def test_too_few_seeds_are_said(folder):
    write(folder, "tiny", records(seeds=1))
    claims_page, page = written(folder)
    assert "Too few seeds: 1 of 2" in claims_page
    assert "Too few seeds: 1 of 2" in page


def test_a_configuration_that_has_changed_is_said():
    lines = records()
    assert not Result(ENTRY, Path("tiny"), lines).outdated
    assert Result(ENTRY, Path("tiny"), [{**lines[0], "config": "other"}]).outdated
    assert Result(ENTRY, Path("tiny"), [{**lines[0], "arm": "gone"}]).outdated


def test_the_command_says_what_is_not_the_default():
    lines = records(seeds=2)
    start = "moe-jax ablate --ablation=paper/full --scale=cpu"
    assert command_of(ENTRY.file, FULL, lines, None) == start
    only = [line for line in lines if line["arm"] == "switch" and line["seed"] == 0]
    expected = f"{start} --seeds=1 --arms=switch --output=there"
    assert command_of(ENTRY.file, FULL, only, "there") == expected
    short = [{**line, "steps": 5} for line in lines]
    assert command_of(ENTRY.file, FULL, short, None) == f"{start} --steps=5"


def test_results_are_read_in_the_order_of_the_ablations(folder):
    for name in ("other", "tiny/gpu", "tiny", "unknown"):
        write(folder, name, records())
    found = results((ENTRY, OTHER), folder)
    assert [result.folder.as_posix() for result in found] == ["tiny", "tiny/gpu", "other"]
    assert read(folder / "tiny" / "results.jsonl") == records()


def test_nothing_yet(folder):
    claims_page, page = written(folder)
    assert "No result is committed yet." in claims_page
    assert "| claim |" not in claims_page
    assert "<table>" not in page


def test_the_page_asks_nobody_for_anything(folder):
    write(folder, "tiny", records())
    _, page = written(folder)
    assert not re.search(r"https?://|<script[^>]|@import|url\(", page)
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_a_page_without_the_comments_is_rejected():
    with pytest.raises(ConfigError, match="README.md has no <!-- ablations -->"):
        put("text", "table", README)


def test_exploratory_claims_are_counted_and_shown_apart(folder):
    paper, sooner, *_ = FULL.claims
    ours = dataclasses.replace(paper, text="Switch is better (ours)")
    registered = dataclasses.replace(FULL, registered="0123456789abcdef", claims=(paper, ours))
    entry = CatalogueEntry(Path("experiments/tiny.py"), registered)
    (section,) = sections([Result(entry, Path("tiny"), records(registered, seeds=4))], folder)
    assert [row.registered for row in section.rows] == [True, False]
    assert (
        summary([section])
        == "1 registered claims: 1 reproduced. 1 exploratory claims: 1 reproduced."
    )
    text = markdown(registered, records(registered, seeds=4), [], "a command")
    before, _, after = text.partition("Exploratory claims, which no paper makes:")
    assert "Switch is better |" in before and "Switch is better (ours) |" in after


def test_the_page_is_read_and_filtered_in_a_browser():
    index = RESULTS / "index.html"
    with browser.started() as chromium:
        browser.check(chromium, index)
        with browser.opened(chromium, index.as_uri()) as page:
            rows, named = page.locator("tr[data-verdict]"), "contradicted"
            page.select_option("#verdict", named)
            shown = [row.get_attribute("data-verdict") for row in rows.all() if row.is_visible()]
            assert shown and set(shown) == {named}
            page.select_option("#verdict", "")
            page.select_option("#paper", "switch")
            sections = page.locator("section[data-paper]").all()
            papers = [one.get_attribute("data-paper") for one in sections if one.is_visible()]
            assert papers and set(papers) == {"switch"}
