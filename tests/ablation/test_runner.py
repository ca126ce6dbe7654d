"""The runner as a user starts it."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import pytest

import moe_jax
from moe_jax.ablation.reproduce import reproduce
from moe_jax.ablation.runner import runs_of, to_train
from moe_jax.run.workdir import locked
from moe_jax.training.metrics import read_metrics
from tests.ablation import tiny_changed, tiny_dependent, tiny_diverging
from tests.system.runs import ROOT, TIMEOUT, command, environment

TIMED = ("seconds", "tokens_per_second", "step_seconds")
ABLATION = "--ablation=tests/ablation/tiny_ablation.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ablation")


def run(folder, *arguments):
    return command("moe_jax.cli.ablate", ABLATION, f"--workdir={folder}", *arguments)


def results(folder):
    return [
        json.loads(line) for line in (folder / "tiny" / "results.jsonl").read_text().splitlines()
    ]


def killed(folder):
    """Starts the runner and kills it, and what it trains, once it has its first result."""
    arguments = ["-m", "moe_jax.cli.ablate", ABLATION, f"--workdir={folder}"]
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


def interrupted(folder):
    """Starts the runner and sends it, alone, Ctrl-C while it trains; how it ended."""
    began = time.time_ns()
    runner = subprocess.Popen(
        [sys.executable, "-m", "moe_jax.cli.ablate", ABLATION, f"--workdir={folder}"],
        cwd=ROOT,
        env=environment(1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end and not _under_way(folder, began):
        assert runner.poll() is None, runner.communicate()
        time.sleep(0.02)
    runner.send_signal(signal.SIGINT)
    out, err = runner.communicate(timeout=TIMEOUT)
    return runner.returncode, out, err


def _under_way(folder, began):
    """Whether a run has logged a step since then and is not finished."""
    logs = [log for log in folder.glob("runs/*/metrics.jsonl") if log.stat().st_size]
    logs = [log for log in logs if log.stat().st_mtime_ns > began]
    return any(not (log.parent / "result.json").exists() for log in logs)


def untimed(line):
    return {key: value for key, value in line.items() if key not in TIMED}


def test_a_killed_runner_repeats_nothing_and_ends_in_the_same_report(folder, tmp_path):
    killed(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/result.json")}
    assert 1 <= len(times) < 4
    assert not (folder / "tiny" / "report.md").exists()

    code, out, err = interrupted(folder)
    assert code == 130, (out, err)
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("stopped by Ctrl-C: ")
    assert last.endswith("are saved; run the same command to go on")
    # The runner has waited for what it trains: every folder is free.
    for config in folder.glob("runs/*/config.json"):
        with locked(config.parent):
            pass

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
    for name in ("curves.png", "effects.png"):
        assert (folder / "tiny" / name).stat().st_size > 1000

    never_killed = run(tmp_path, "--seeds=1", "--side_by_side=2")
    assert never_killed.returncode == 0, never_killed.stderr
    assert [untimed(line) for line in results(tmp_path)] == [untimed(line) for line in lines[:2]]

    assert run(folder).returncode == 0
    assert (folder / "tiny" / "report.md").read_text() == report
    assert results(folder) == lines


def test_results_are_what_the_runs_logged(folder):
    if not (folder / "tiny").exists():
        assert run(folder, "--seeds=1").returncode == 0
    for line in results(folder):
        logged = [x for x in read_metrics(folder / "runs" / line["config"]) if x["kind"] == "train"]
        assert line["curve"] == [[x["step"], x["loss"]] for x in logged]
        result = json.loads((folder / "runs" / line["config"] / "result.json").read_text())
        assert line["parameters"] == result["total_parameters"]
        assert line["versions"]["jax"] == jax.__version__
        for name in ("flops_per_token", "steps", "tokens", "loss"):
            assert line[name] == result[name]
        assert (line["dropped"] > 0) <= (line["arm"] == "switch")
        assert [len(load) for load in line["load"]] == ([2] if line["arm"] == "switch" else [])
        assert all(sum(load) == pytest.approx(1, abs=1e-3) for load in line["load"])
        assert line["step_seconds"] * line["tokens_per_second"] * line["steps"] == pytest.approx(
            line["tokens"]
        )


def test_python_returns_records_and_verdicts(folder):
    if not (folder / "tiny").exists():
        assert run(folder).returncode == 0
    said = []
    done = reproduce(ROOT / "tests/ablation/tiny_ablation.py", workdir=folder, say=said.append)
    assert done.records == results(folder)
    assert [verdict.claim.text for verdict in done.verdicts] == ["Switch is better"]
    assert said == [f"report: {done.report}"] and done.report.exists()


def test_what_an_arm_needs_is_trained_first_and_all_of_it_can_be_moved(tmp_path):
    ablation = tiny_dependent.ABLATION
    file = "--ablation=tests/ablation/tiny_dependent.py"
    there = tmp_path / "there"
    done = command("moe_jax.cli.ablate", file, f"--workdir={there}", "--arms=student")
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, (there / "tiny_dependent/results.jsonl").read_text().splitlines())
    assert line["arm"] == "student"
    teacher, student = runs_of(ablation, "cpu", 1, ["teacher", "student"], there)
    assert teacher.finished and student.finished and student.folder.name == line["config"]
    assert all(logged["distillation_loss"] > 0 for logged in student.lines)
    moved = there.rename(tmp_path / "moved")
    assert to_train(runs_of(ablation, "cpu", 1, ["teacher", "student"], moved)) == []


def test_an_arm_starts_from_a_run_that_a_command_has_changed(tmp_path):
    file = "--ablation=tests/ablation/tiny_changed.py"
    done = command("moe_jax.cli.ablate", file, f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "tiny_changed/results.jsonl"
    switch, pruned, recovered = map(json.loads, path.read_text().splitlines())
    assert (switch["arm"], pruned["arm"], recovered["arm"]) == ("switch", "pruned", "recovered")
    runs = runs_of(tiny_changed.ABLATION, "cpu", 1, ["pruned"], tmp_path)
    change = runs[0].needs["training.start_from"]
    # The changed run evaluates to the loss of the arm that starts from it without training.
    assert pruned["loss"] == pytest.approx(
        moe_jax.open_run(change.folder).evaluate()["loss"], rel=1e-6
    )
    assert pruned["parameters"] < switch["parameters"]


def test_a_run_that_diverges_is_an_outcome(tmp_path):
    file = "--ablation=tests/ablation/tiny_diverging.py"
    done = command("moe_jax.cli.ablate", file, f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    output = tmp_path / "tiny_diverging"
    fast, slow = map(json.loads, (output / "results.jsonl").read_text().splitlines())
    # What starts from the run that diverged cannot start.
    assert (fast["arm"], slow["arm"]) == ("fast", "slow")
    # The gradient of the weights after the first update is not finite: two are skipped in a row.
    assert fast["diverged"] == 1 and "loss" not in fast
    assert [step for step, _ in fast["curve"]] == [1, 2, 3]
    assert [step for step, _ in slow["curve"]] == [1, 2, 3, 4]
    assert (
        "`fast` diverged: loss or gradient stayed non-finite after step 1 (seed 0)."
        in (output / "report.md").read_text()
    )

    runs = runs_of(tiny_diverging.ABLATION, "cpu", 1, ["fast", "slow", "tuned"], tmp_path)
    assert [run.ended for run in runs] == [True, True, False]
    log = runs[0].folder / "log.txt"
    assert "lower optimizer.learning_rate" in log.read_text()
    again = command("moe_jax.cli.ablate", file, f"--workdir={tmp_path}")
    assert again.returncode == 0, again.stderr
    assert log.read_text().count("lower optimizer.learning_rate") == 1  # it is not trained again
    nothing = command("moe_jax.cli.ablate", file, f"--workdir={tmp_path}", "--arms=tuned")
    assert nothing.returncode == 2
    assert nothing.stdout.strip() == (
        "left out: arm tuned, seed 0: a run that it needs has diverged"
    )
    assert nothing.stderr.strip() == "error: no run ended: the runs that tuned need have diverged"


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
