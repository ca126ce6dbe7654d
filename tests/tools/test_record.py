"""Pages show the tables of the committed figures."""

import json
from pathlib import Path

import pytest

from tools import draft_speed, offload_demo, offload_speed, serve_speed

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("tool", "file", "page"),
    [
        (serve_speed, "experiments/benchmarks/cpu_serving.json", "benchmarks.md"),
        (offload_speed, "experiments/benchmarks/offload.json", "serving.md"),
        (offload_demo, "experiments/benchmarks/offload_mixtral.json", "offloading.md"),
        (draft_speed, "experiments/benchmarks/drafts.json", "serving.md"),
    ],
    ids=lambda part: getattr(part, "__name__", None),
)
def test_a_page_shows_the_table_of_its_figures(tool, file, page):
    figures = ROOT / file
    before, after = tool._MARKS
    shown = (ROOT / "docs" / page).read_text().split(before)[1].split(after)[0]
    assert shown == (tool.table(json.loads(figures.read_text())) if figures.exists() else "")
