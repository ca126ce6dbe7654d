"""A run that is stopped, or finds its disk full, says one line, and the same command goes on."""

import json
import shutil
import signal
import subprocess
import sys

import pytest

from tests.system.runs import ROOT, TIMEOUT, assert_same, environment

INT, TERM = signal.SIGINT, signal.SIGTERM
# In this order, in one folder: each goes on where the one before was stopped. The exit code and
# the last line are those of docs/runs.md.
_STOPS = {
    "tokenizer": ([TERM], 143, "stopped by SIGTERM; run the same command to go on"),
    "compiling": ([INT], 130, "stopped by Ctrl-C; run the same command to go on"),
    "step 5": (
        [INT],
        130,
        "stopped by Ctrl-C at step 5, which is saved; run the same command to go on",
    ),
    "step 7": (
        [INT, INT],
        130,
        "stopped by Ctrl-C a second time, nothing more is saved; run the same command to go on",
    ),
    "restoring": ([TERM], 143, "stopped by SIGTERM; run the same command to go on"),
    "evaluation": ([INT], 130, "stopped by Ctrl-C; run the same command to go on"),
    "report": ([TERM], 143, "stopped by SIGTERM; run the same command to go on"),
}
_HELD = "Ctrl-C: the command saves its work and then ends; a second signal ends it at once"


def _run(cases):
    done = subprocess.run(
        [sys.executable, "-m", "tests.system.stopped"],
        cwd=ROOT,
        env=environment(1),
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def stopped(whole, tmp_path_factory):
    """The folder of a run that was stopped in every phase, and how each start ended."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    arguments = [*whole().flags, f"--workdir={folder}"]
    cases = [
        {"arguments": arguments, "phase": phase, "signals": list(map(int, numbers))}
        for phase, (numbers, _, _) in _STOPS.items()
    ]
    ends = _run([*cases, {"arguments": arguments}])
    return folder, dict(zip([*_STOPS, "finished"], ends, strict=True))


@pytest.mark.parametrize("phase", _STOPS)
def test_a_signal_in_any_phase_is_one_line(stopped, phase):
    code, out, err = stopped[1][phase]
    _, expected, line = _STOPS[phase]
    said = [line for line in err.splitlines() if line and line != _HELD]
    # A run that has saved its step says so where it says everything.
    said += [line for line in out.splitlines() if line.startswith("stopped")]
    assert (code, said) == (expected, [line]), (out, err)
    assert (_HELD in err) == (phase in ("step 5", "step 7"))


def test_the_same_command_goes_on_after_each_of_them_and_ends_bit_by_bit_alike(stopped, whole):
    folder, ends = stopped
    assert "resuming at step 5 of 40" in ends["step 7"][1]
    assert "resuming at step 5 of 40" in ends["evaluation"][1]
    assert "resuming at step 40 of 40" in ends["report"][1]
    code, out, err = ends["finished"]
    assert code == 0 and "is finished; its results are in" in out
    # The run was stopped between its result and its report.
    assert "report.html is missing or cut: written again" in err
    assert (folder / "report.html").read_text().rstrip().endswith("</html>")
    assert_same(folder, whole().folder)


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_space(whole, tmp_path):
    folder = tmp_path / "run"
    arguments = [*whole().flags, f"--workdir={folder}"]
    # Room for a few bytes of the line of step 15; then none for the checkpoint of step 20.
    log, checkpoint = _run(
        [
            {"arguments": arguments, "phase": 15, "bytes": 40},
            {"arguments": arguments, "phase": 15, "bytes": 0},
        ]
    )
    for code, _, err in (log, checkpoint):
        assert code == 2 and len(err.splitlines()) == 1, err
        assert err.startswith("error: ")
    assert "cannot be written (File too large): make space, then run the same command" in log[2]
    assert "step 20 was not saved" in checkpoint[2]
    assert "checkpoint 10 is as it was" in checkpoint[2]
    assert "then run the same command to go on" in checkpoint[2]
    ((code, out, err),) = _run([{"arguments": arguments}])
    assert code == 0 and "resuming at step 10 of 40" in out, err
    assert_same(folder, whole().folder)


def test_lost_files_of_a_run_are_named_and_what_can_be_is_repaired(whole, tmp_path):
    reference = whole().folder
    folder = shutil.copytree(reference, tmp_path / "run")
    arguments = [*whole().flags, f"--workdir={folder}"]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    # Of the 42 lines the last ten, and half of the eleventh from the end; it is that of step 31.
    (folder / "metrics.jsonl").write_text("\n".join(lines[:31]) + "\n" + lines[31][:60])
    for name in ("result.json", "report.html", "config.json", "tokenizer.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints" / "40")
    shutil.rmtree(folder / "tensorboard")
    # The checkpoint of step 30 knows of 30 training steps and the evaluation at 20.
    kept = [line for line in lines[:31] if '"step": 30' not in line]
    (folder / "metrics.jsonl").write_text("\n".join(kept[:24]))
    ((code, out, err),) = _run([{"arguments": arguments}])
    assert code == 0 and "resuming at step 30 of 40" in out, err
    warnings = err.splitlines()
    assert len(warnings) == 3, err
    assert "config.json is missing: the run goes on with the settings of this command" in err
    assert "metrics.jsonl has lost logged lines (7 lines are missing: steps 24 to 30)" in err
    assert "tensorboard had lost steps 1 to 23: written again from metrics.jsonl" in err
    assert json.loads((folder / "result.json").read_text())["lost_lines"]
    assert "7 lines are missing: steps 24 to 30" in (folder / "report.html").read_text()
