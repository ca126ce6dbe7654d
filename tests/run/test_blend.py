"""A run on a blend: its parts have validation losses of their own."""

import json

import pytest

import moe_jax as mj
from tests.data.corpora import write_rows
from tests.system import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blend")
    write_rows(folder / "a.jsonl", [{"text": "ab" * 40} for _ in range(30)])
    write_rows(folder / "b.jsonl", [{"text": "xyz" * 30} for _ in range(40)])
    parts = [{"source": f"files:{folder}/{name}.jsonl", "name": name} for name in "ab"]
    changes = {
        "data.source": "blend",
        "data.blend.parts": tuple(parts),
        "data.blend.temperature": 2.0,
        "data.data_dir": str(folder / "data"),
        "training.steps": 2,
        "training.eval_every": 1,
    }
    return mj.train(tiny.get_config(), folder / "run", changes)


def test_metrics_result_and_report_have_the_loss_of_each_part(run):
    evaluations = [line for line in run.metrics if line["kind"] == "eval"]
    assert [list(line["parts"]) for line in evaluations] == [["a", "b"], ["a", "b"]]
    result = json.loads((run.workdir / "result.json").read_text())
    assert result["parts"] == evaluations[-1]["parts"]
    report = run.report.read_text()
    for name, part in result["parts"].items():
        assert f"validation loss, {name}" in report
        assert f"{part['loss']:.4f} nats per token" in report


def test_the_losses_of_the_parts_add_up(run):
    # Held out are 1 document of 81 targets and 2 of 91, the end tokens included.
    parts, whole = run.result["parts"], run.result["loss"]
    assert parts["a"]["loss"] != parts["b"]["loss"]
    assert (parts["a"]["loss"] * 81 + parts["b"]["loss"] * 182) / 263 == pytest.approx(whole)


def test_the_parts_of_the_validation_set_are_groups_of_an_analysis(run):
    found = mj.analyze(run.workdir, "validation", length=16, batch_size=4)
    # Held out are 1 document of part a and 2 of b; a prefix of 15 bytes of each is read.
    groups = [(one["name"], one["documents"], one["tokens"]) for one in found["groups"]]
    assert groups == [("a", 1, 16), ("b", 2, 32)]
    assert found["gap"]["interval"] is None
    pieces = {token["piece"] for one in found["atlas"][0] for token in one["tokens"]}
    assert set("abxyz") <= pieces
