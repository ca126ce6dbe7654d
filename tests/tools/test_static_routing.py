"""The measurement of static routing: its file, its page, and its work on a small run."""

import json
from pathlib import Path

import pytest

from tests.system.runs import write_text
from tools.static_routing import SETTINGS, STEPS, VARIANTS, measured, table

FOUND = json.loads(Path("docs/static_routing.json").read_text())


def test_the_page_shows_the_committed_file():
    assert table(FOUND) in Path("docs/serving.md").read_text()


def test_the_file_is_of_these_models():
    assert [(one["model"], one["steps"]) for one in FOUND] == [(name, STEPS) for name in VARIANTS]
    for one in FOUND:
        increase = one["with_table"]["loss"] - one["loss"]
        assert one["with_table"]["loss_increase"] == pytest.approx(increase)
        assert one["with_table"]["table_ids"] == one["table_ids"] > 0


def test_a_small_run_is_measured(tmp_path):
    corpus = write_text(tmp_path / "text")
    small = {
        **SETTINGS,
        **dict.fromkeys(("training.steps", "training.checkpoint_every"), 2),
        "optimizer.warmup_steps": 1,
        "data.source": corpus,
        "data.tokenizer": "bytes",
        "data.seq_length": 256,
        "model.num_layers": 2,
        "model.width": 16,
    }
    found = measured("quickstart", tmp_path, corpus, small)
    assert (found["model"], found["steps"], len(found["agreement"])) == ("quickstart", 2, 1)
    assert found["with_table"]["loss"] != found["loss"]
    assert table([found]).count("\n") == 3
