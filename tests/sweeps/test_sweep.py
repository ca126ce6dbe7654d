"""Sweeps as a user starts them; runs that have ended are written by hand where that suffices."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import moe_jax as mj
from moe_jax.config.loading import experiment_of_texts
from moe_jax.errors import ConfigError
from moe_jax.run import workdir
from moe_jax.sweeps.axes import axes_of, grid
from moe_jax.sweeps.plan import SweepPlan
from moe_jax.sweeps.sweep import sweep
from moe_jax.training.metrics import MetricsWriter
from tests import browser
from tests.system.runs import ROOT, TIMEOUT, command, environment, error_line

FILE = str(ROOT / "tests/system/tiny.py")
SMALL = {
    "data.source": "mixture",
    "data.eval_documents": "4",
    "data.mixture.num_documents": "64",
    "data.mixture.num_eval_documents": "4",
    "data.mixture.document_length": "64",
    "training.steps": "4",
    "training.eval_every": "0",
    "training.checkpoint_every": "2",
}
FLAGS = [f"--config={FILE}", *(f"--config.{name}={text}" for name, text in SMALL.items())]
RATES = "optimizer.learning_rate=1e-3,3e-3"


def ended(folder, texts, loss):
    """Writes the files of a run that has ended; ``None`` as its loss diverges."""
    experiment, _ = experiment_of_texts(FILE, {**SMALL, **texts})
    workdir.claim(folder, experiment)
    with MetricsWriter(folder) as writer:
        for step in (1, 2):
            line = {"loss": 3.0 / step, "tokens_per_second": 100.0, "layers": []}
            writer.write({"kind": "train", "step": step, **line})
    numbers = {"loss": loss, "bits_per_byte": 1.0, "accuracy": 0.5}
    text = json.dumps({"step": 1} if loss is None else numbers)
    (folder / (workdir.DIVERGED if loss is None else workdir.RESULT)).write_text(text)


@pytest.fixture
def whole(tmp_path):
    """The folder of a sweep of three runs, one of which has diverged."""
    losses = {"0.001": 2.5, "0.003": 2.25, "1.0": None}
    for rate, loss in losses.items():
        name = f"optimizer.learning_rate={rate}"
        ended(tmp_path / "runs" / name, {"optimizer.learning_rate": rate}, loss)
    return tmp_path


def test_runs_that_have_ended_are_not_trained_again(whole):
    said = []
    over = {"optimizer.learning_rate": [1e-3, 3e-3, 1]}
    times = {path: path.stat().st_mtime_ns for path in whole.glob("runs/*/*.json")}
    done = sweep(FILE, over, whole, SMALL, say=said.append)
    assert {path: path.stat().st_mtime_ns for path in whole.glob("runs/*/*.json")} == times
    assert not list(whole.glob("runs/*/log.txt"))

    rates = [(line["optimizer.learning_rate"], line.get("loss")) for line in done.records]
    assert rates == [("0.003", 2.25), ("0.001", 2.5), ("1.0", None)]
    assert done.best["run"] == "optimizer.learning_rate=0.003"
    lines = (whole / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == done.records
    assert [line.split() for line in said[0].splitlines()[:4]] == [
        ["optimizer.learning_rate", "loss"],
        ["0.003", "2.2500"],
        ["0.001", "2.5000"],
        ["1.0", "diverged"],
    ]
    page = done.report.read_text()
    assert "optimizer.learning_rate" in page and page.count("<svg") == 5


def test_the_page_is_read_in_a_browser(whole):
    done = sweep(FILE, {"optimizer.learning_rate": [1e-3, 3e-3, 1]}, whole, SMALL)
    with browser.started() as chromium:
        browser.check(chromium, done.report)


def test_the_metric_ranks_the_runs(whole):
    result = whole / "runs/optimizer.learning_rate=0.001" / workdir.RESULT
    result.write_text(json.dumps({"loss": 2.5, "bits_per_byte": 1.0, "accuracy": 0.75}))
    over = {"optimizer.learning_rate": "0.003,0.001"}
    done = sweep(FILE, over, whole, SMALL, metric="accuracy")
    assert done.best["optimizer.learning_rate"] == "0.001"


def test_a_folder_of_other_settings_is_refused_before_any_run_starts(whole):
    with pytest.raises(mj.ConfigError, match="training.steps: 4 there, 5 here"):
        sweep(FILE, {"optimizer.learning_rate": [1e-3]}, whole, {**SMALL, "training.steps": "5"})
    assert not (whole / "sweep.html").exists()


@pytest.mark.parametrize(
    ("over", "options", "said"),
    [
        ({"optimizer.learning_rat": [1]}, {}, "did you mean 'learning_rate'"),
        ({"optimizer.learning_rate": "fast,2"}, {}, "flag --config.optimizer.learning_rate=fast"),
        ({"optimizer.learning_rate": [-1]}, {}, "learning_rate=-1"),
        ({"optimizer.learning_rate": "1e-4:1e-2"}, {}, "add --sampler=tpe"),
        ({"name": "1:2"}, {"sampler": "random", "trials": 2}, "--over name is no number"),
        ({"seed": "0..1"}, {"sampler": "tp", "trials": 2}, "--sampler=tp is unknown; did you mean"),
        ({"seed": "0..1"}, {"metric": "los"}, "--metric=los is unknown; did you mean 'loss'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, over, options, said):
    with pytest.raises(mj.ConfigError) as error:
        sweep(FILE, over, tmp_path / "sweep", SMALL, **options)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "sweep").exists()


def test_the_command_of_a_run_has_all_settings(tmp_path):
    plan = SweepPlan(FILE, {"training.steps": "4", "model.gated": None}, tmp_path)
    (axis,) = axes_of(["seed=1"])
    trial = plan.checked({axis.name: "1"})
    assert plan.task(trial, "cpu").arguments == (
        f"--config={FILE}",
        "--config.training.steps=4",
        "--config.model.gated",
        "--config.training.seed=1",
        "--config.data.seed=1",
    )
    assert trial.folder == tmp_path / "runs" / "seed=1"


def test_the_type_of_a_setting_decides_whether_a_range_has_whole_numbers(tmp_path):
    plan = SweepPlan(FILE, SMALL, tmp_path)
    warmup, rate = axes_of(["optimizer.warmup_steps=1:4", "optimizer.learning_rate=1:4"])
    assert plan.typed(warmup).whole and not plan.typed(rate).whole


def killed(folder, *arguments):
    """Starts a sweep and kills it, and what it trains, once it has its first result."""
    runner = subprocess.Popen(
        [sys.executable, "-m", "moe_jax", "sweep", *FLAGS, f"--workdir={folder}", *arguments],
        cwd=ROOT,
        env=environment(1),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end and not list(folder.glob("runs/*/result.json")):
        assert runner.poll() is None, "the sweep ended by itself"
        time.sleep(0.05)
    os.killpg(runner.pid, signal.SIGKILL)
    runner.wait()


def test_a_killed_sweep_goes_on(tmp_path):
    killed(tmp_path, f"--over={RATES}", "--over=seed=0..1")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/result.json")}
    assert 1 <= len(times) < 4
    arguments = [*FLAGS, f"--workdir={tmp_path}", "--over", RATES, "--over", "seed=0..1"]
    done = command("moe_jax", "sweep", *arguments, "--side-by-side=2")
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert len(done.stdout.splitlines()) == 7
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len({line["loss"] for line in records}) == 4
    # The command trains what the function trains: the settings of the best run give its loss.
    best = workdir.load(tmp_path / "runs" / records[0]["run"])
    assert best.optimizer.learning_rate == float(records[0]["optimizer.learning_rate"])
    assert best.training.seed == best.data.seed == int(records[0]["seed"])


def test_a_killed_sampler_goes_on_and_draws_the_same_points(tmp_path):
    pytest.importorskip("optuna", reason="pip install 'moe_jax[sweep]'")
    choice = ["--over=optimizer.learning_rate=1e-4:1e-2:log", "--sampler=tpe", "--trials=3"]
    killed(tmp_path / "killed", *choice)
    names = []
    for folder in (tmp_path / "killed", tmp_path / "whole"):
        done = command("moe_jax", "sweep", *FLAGS, f"--workdir={folder}", *choice)
        assert done.returncode == 0, done.stderr
        names.append((folder / "results.jsonl").read_text())
    assert names[0] == names[1] and len(names[0].splitlines()) == 3


def test_a_failed_run_does_not_stop_the_others(tmp_path):
    # Twelve rows do not divide over eight devices, which only the run finds out.
    done = command(
        *("moe_jax", "sweep", *FLAGS, f"--workdir={tmp_path}", "--over=data.batch_size=12,8"),
        devices=8,
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: 1 run failed: data.batch_size=12 ended without a")
    assert "data.batch_size=12 does not divide" in last and "log.txt" in last
    assert (tmp_path / "runs/data.batch_size=8/result.json").exists()


def test_values_that_fit_together_alone_are_planned(tmp_path):
    # Eight rows do not divide into three streams, and 12 and 24 rows do.
    plan = SweepPlan("quickstart", {}, tmp_path)
    axes = [plan.typed(axis) for axis in axes_of(["data.batch_size=12,24", "data.streams=3,6"])]
    runs = [plan.checked(point) for point in grid(axes)]
    assert len(runs) == 4
    with pytest.raises(ConfigError, match="cannot be split over data.streams=3"):
        plan.checked({"data.batch_size": "8", "data.streams": "3"})


def test_a_mistake_of_the_command_is_one_line(tmp_path):
    folder = tmp_path / "sweep"
    over = "--over=optimizer.learning_rate=1:x"
    line = error_line(command("moe_jax", "sweep", *FLAGS, f"--workdir={folder}", over))
    assert "flag --config.optimizer.learning_rate=1:x" in line
    assert not folder.exists()
