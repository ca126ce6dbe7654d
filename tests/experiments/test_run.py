"""The runner as a user starts it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments.runs import runs_of, to_train
from moe_jax.training.metrics import read_metrics
from tests.experiments import tiny_dependent
from tests.system.runs import ROOT, TIMEOUT, command, environment

TIMED = ("seconds", "tokens_per_second", "step_seconds")
ABLATION = "--ablation=tests/experiments/tiny_ablation.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ablation")


def run(folder, *arguments):
    return command("experiments.run", ABLATION, f"--workdir={folder}", *arguments)


def results(folder):
    return [
        json.loads(line) for line in (folder / "tiny" / "results.jsonl").read_text().splitlines()
    ]


def killed(folder):
    """Starts the runner and kills it, and what it trains, once it has its first result."""
    arguments = ["-m", "experiments.run", ABLATION, f"--workdir={folder}"]
    runner = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(1),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end and not list(folder.glob("runs/*/result.json")):
        assert runner.poll() is None, "the runner ended by itself"
        time.sleep(0.05)
    os.killpg(runner.pid, signal.SIGKILL)
    runner.wait()


def untimed(line):
    return {key: value for key, value in line.items() if key not in TIMED}


def test_a_killed_runner_repeats_nothing_and_ends_in_the_same_report(folder, tmp_path):
    killed(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/result.json")}
    assert 1 <= len(times) < 4
    assert not (folder / "tiny" / "report.md").exists()

    whole = run(folder)
    assert whole.returncode == 0, whole.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    lines = results(folder)
    assert [(line["seed"], line["arm"]) for line in lines] == [
        (0, "dense"),
        (0, "switch"),
        (1, "dense"),
        (1, "switch"),
    ]
    report = (folder / "tiny" / "report.md").read_text()
    assert "A paper, table 1" in report
    assert "| switch | 1.5 |" in report
    for name in ("curves.png", "curves.svg", "effects.png", "effects.svg"):
        assert (folder / "tiny" / name).stat().st_size > 1000

    never_killed = run(tmp_path, "--seeds=1", "--side_by_side=2")
    assert never_killed.returncode == 0, never_killed.stderr
    assert [untimed(line) for line in results(tmp_path)] == [untimed(line) for line in lines[:2]]

    assert run(folder).returncode == 0
    assert (folder / "tiny" / "report.md").read_text() == report
    assert results(folder) == lines


def test_results_are_what_the_runs_logged(folder):
    if not (folder / "tiny").exists():
        assert run(folder).returncode == 0
    for line in results(folder):
        logged = [x for x in read_metrics(folder / "runs" / line["config"]) if x["kind"] == "train"]
        assert line["curve"] == [[x["step"], x["loss"]] for x in logged]
        assert (line["dropped"] > 0) <= (line["arm"] == "switch")
        assert [len(load) for load in line["load"]] == ([2] if line["arm"] == "switch" else [])
        assert all(sum(load) == pytest.approx(1, abs=1e-3) for load in line["load"])
        assert line["step_seconds"] * line["tokens_per_second"] * line["steps"] == pytest.approx(
            line["tokens"]
        )


def test_what_an_arm_needs_is_trained_first_and_all_of_it_can_be_moved(tmp_path):
    ablation = tiny_dependent.ABLATION
    file = "--ablation=tests/experiments/tiny_dependent.py"
    there = tmp_path / "there"
    done = command("experiments.run", file, f"--workdir={there}", "--arms=student")
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, (there / "tiny_dependent/results.jsonl").read_text().splitlines())
    assert line["arm"] == "student"
    teacher, student = runs_of(ablation, "cpu", 1, ["teacher", "student"], there)
    assert teacher.finished and student.finished and student.folder.name == line["config"]
    assert all(logged["distillation_loss"] > 0 for logged in student.lines)
    moved = there.rename(tmp_path / "moved")
    assert to_train(runs_of(ablation, "cpu", 1, ["teacher", "student"], moved)) == []


def test_a_dry_run_trains_nothing(tmp_path):
    done = run(tmp_path, "--dry-run", "--scale=gpu", "--seeds=3")
    assert done.returncode == 0, done.stderr
    assert "6 runs, 6 to train" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--arms=swich"], "did you mean 'switch'"), (["--scale=pod"], "no scale 'pod'")],
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
