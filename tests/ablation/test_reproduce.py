"""Looks at a growing number of seeds; ``test_runner.py`` trains real runs."""

import dataclasses

import pytest

from moe_jax.ablation import reproduce
from moe_jax.ablation.ablation import Claim
from moe_jax.ablation.runner import Run
from tests.ablation.tiny_ablation import ABLATION

# In this order, b differs from a by 0.5 at every seed, and c from b by 0.02 to either side.
LOSSES = {"a": lambda seed: 2.0, "b": lambda seed: 1.5 + 0.001 * (seed % 3)}
LOSSES["c"] = lambda seed: LOSSES["b"](seed) + 0.02 * (-1) ** seed
FILE = "tests/ablation/tiny_ablation.py"
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
