"""Looks at a growing number of seeds; ``test_runner.py`` trains real runs."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from moe_jax.ablation import reproduce
from moe_jax.ablation.ablation import Claim
from moe_jax.ablation.runner import Run
from moe_jax.errors import ConfigError
from tests.ablation.tiny_ablation import ABLATION

# In this order, b differs from a by 0.5 at every seed, and c from b by 0.02 to either side.
LOSSES = {"a": lambda seed: 2.0, "b": lambda seed: 1.5 + 0.001 * (seed % 3)}
LOSSES["c"] = lambda seed: LOSSES["b"](seed) + 0.02 * (-1) ** seed
FILE = "tests/ablation/tiny_ablation.py"
OTHER = "has another configuration now at --scale=cpu"
REGISTERED = dataclasses.replace(
    ABLATION,
    arms={
        arm: {"optimizer.learning_rate": rate} for arm, rate in zip("abc", (1, 2, 3), strict=True)
    },
    claims=(Claim("b is lower", "loss", "b", "a"), Claim("c is lower", "loss", "c", "b")),
    published=(),
    seeds=12,
    registered="0123456789abcdef",
)


@pytest.fixture
def trained(monkeypatch):
    """Returns the list of the arms and seeds of each call that trains runs; none is trained."""
    calls = []

    def record(run):
        loss = LOSSES[run.arm](run.seed)
        return {"arm": run.arm, "seed": run.seed, "loss": loss, "curve": [[1, loss]]}

    monkeypatch.setattr(reproduce, "load", lambda file: REGISTERED)
    monkeypatch.setattr(
        reproduce, "execute", lambda runs, *_: calls.append({(r.arm, r.seed) for r in runs})
    )
    monkeypatch.setattr(reproduce, "record", record)
    monkeypatch.setattr(reproduce, "command_of", lambda *_: "")
    monkeypatch.setattr(reproduce, "write_report", lambda *_: None)
    monkeypatch.setattr(Run, "ended", property(lambda run: True))
    return calls


def seeds(call, arm):
    return sorted(seed for name, seed in call if name == arm)


def test_open_claims_alone_get_more_seeds(trained, tmp_path):
    said = []
    done = reproduce.reproduce(FILE, workdir=tmp_path, say=said.append)
    first, second, third = trained
    assert {arm: seeds(first, arm) for arm in "abc"} == dict.fromkeys("abc", [0, 1, 2, 3])
    assert [seeds(second, arm) for arm in "abc"] == [[0, 1, 2, 3], list(range(8)), list(range(8))]
    assert [seeds(third, arm) for arm in "abc"] == [[0, 1, 2, 3], list(range(12)), list(range(12))]
    assert said[0] == "8 seeds of b, c, which are not decided: 8 runs"
    assert len(done.records) == 4 + 12 + 12


def test_the_number_of_seeds_limits_the_looks(trained, tmp_path):
    done = reproduce.reproduce(FILE, workdir=tmp_path, seeds=4)
    assert len(trained) == 1
    assert len(done.records) == 12


def test_arms_that_are_left_out_get_no_seeds(trained, tmp_path):
    reproduce.reproduce(FILE, workdir=tmp_path, arms=["b", "c"], seeds=8)
    assert [len(call) for call in trained] == [8, 16]


def lines(arms, seeds, **changes):
    runs = reproduce.runs_of(REGISTERED, "cpu", seeds, arms, Path())
    return [
        {
            "arm": run.arm,
            "seed": run.seed,
            "scale": "cpu",
            "config": run.folder.name,
            "loss": LOSSES[run.arm](run.seed),
            "curve": [[1, LOSSES[run.arm](run.seed)]],
        }
        | changes
        for run in runs
    ]


def written(path, records):
    path.write_text("".join(json.dumps(line) + "\n" for line in records))
    return path


def test_recorded_runs_are_not_trained_again(trained, tmp_path):
    records = lines("abc", 4)
    written(tmp_path / "results.jsonl", records)
    done = reproduce.reproduce(FILE, workdir=tmp_path / "out", seeds=8, records=tmp_path)
    first, second = trained
    assert not first
    assert [seeds(second, arm) for arm in "abc"] == [[], [4, 5, 6, 7], [4, 5, 6, 7]]
    assert done.records[:12] == sorted(records, key=lambda line: line["seed"])
    assert len(done.records) == 4 + 8 + 8


def test_a_plan_counts_recorded_runs_as_trained(trained, tmp_path):
    path = written(tmp_path / "results.jsonl", lines("ab", 2))
    wanted = reproduce.study(FILE, seeds=2, arms=["a", "b"], records=path)
    assert wanted.own_runs == [] and len(wanted.records) == 4
    assert wanted.left == [] and wanted.outline().endswith("4 runs, 0 to train, about 0 min")


def test_a_plan_counts_the_runs_of_the_next_look(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "ended", property(lambda run: False))
    path = written(tmp_path / "results.jsonl", lines("abc", 4))
    wanted = reproduce.study(FILE, records=path)
    # The claim about a and b is decided; b and c need seeds 4 to 7.
    assert [(run.arm, run.seed) for run in wanted.left] == [
        (arm, seed) for seed in (4, 5, 6, 7) for arm in "bc"
    ]


@pytest.mark.parametrize(
    ("records", "line"),
    [
        (None, "is not a file; omit --records to train all"),
        ([{"arm": "a"}], "is no results.jsonl of an ablation"),
        (
            lines("a", 1, config="0123"),
            "arm a, seed 0 has another configuration now at --scale=cpu",
        ),
        (lines("a", 1, scale="gpu"), "arm a, seed 0 has another configuration now at --scale=cpu"),
        (lines("a", 1, arm="d"), "arm d, seed 0 has another configuration now at --scale=cpu"),
        (
            lines("a", 1, corpus="f" * 64, versions={"python": "3.9.1"}),
            "and in --records ffffffffffff (Python 3.9.1); omit --records to train all",
        ),
    ],
)
def test_records_of_other_runs_are_refused(trained, tmp_path, records, line):
    path = tmp_path / "results.jsonl"
    if records is not None:
        written(path, records)
    with pytest.raises(ConfigError, match=re.escape(line)):
        reproduce.reproduce(FILE, workdir=tmp_path, arms=["a"], records=path)
    assert trained == []
