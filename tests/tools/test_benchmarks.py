"""The page shows the committed rows, and a ratio is one of times on the same work."""

import json
from pathlib import Path

import pytest

from tools.benchmarks import FOLDER, RUNS, Rows, Target, table


def row(name, share, p50=1.0, **changes):
    base = {"direction": "forward", "shape": "tiny", "regime": "balanced"}
    return {**base, "name": name, "ceiling_share": share, "p50": p50, **changes}


@pytest.fixture
def folder(tmp_path):
    rows = [
        row("moe_jax/auto", 0.6),
        row("moe_jax/auto/capacity_1", 0.9),
        row("transformers/eager", 0.3),
        row("transformers/grouped_mm", 0.5),
        row("transformers/compiled", None, None),
        row("transformers/eager", 0.8, regime="zipf"),
    ]
    (tmp_path / "cpu.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return tmp_path


def test_the_fastest_peer_counts_and_one_candidate_is_exactly_that(folder):
    ours = Rows("cpu", "moe_jax/auto", "forward", "tiny")
    peers = Rows("cpu", "transformers/", "forward", "tiny")
    assert ours.best(folder)["ceiling_share"] == 0.6
    assert peers.best(folder)["name"] == "transformers/grouped_mm"
    # Ours reaches 0.6 of the ceiling and the peer 0.5: the same work takes 5/6 of its time.
    assert Target("", ours, peers, 1.0).ratio(folder) == pytest.approx(5 / 6)


def test_a_ratio_without_rows_is_empty(folder):
    ours = Rows("cpu", "moe_jax/auto", "forward", "another")
    assert Target("", ours, ours, 1.0).ratio(folder) is None
    assert Target("", ours, ours, 1.0).ratio(folder / "missing") is None


def test_the_page_shows_the_committed_rows():
    assert table(FOLDER) in Path("docs/benchmarks.md").read_text()


def test_no_row_without_a_time_or_a_reason():
    files = [FOLDER / f"{name}.jsonl" for name in RUNS]
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    assert lines
    for found in map(json.loads, lines):
        assert (found["p50"] is None) == bool(found["skipped"])
