"""A command that writes one result ends with one line, and leaves no half of it."""

import json
import shutil
import signal
import subprocess
import sys
import types

import pytest

from moe_jax.interop.staging import lives
from tests.parity.compare_models import recorded
from tests.system.runs import CONFIG, ROOT, TIMEOUT, environment

INT, TERM, KILL = map(int, (signal.SIGINT, signal.SIGTERM, signal.SIGKILL))


def _cases(top):
    """By name: a module, its arguments, the phase in which it is stopped, and the signals."""
    there = ["--from=hf", f"--input={top}/hf", f"--output={top}/out/converted"]
    back = ["--from=moe_jax", f"--input={top}/out/converted", f"--output={top}/out/exported"]
    sweep = [CONFIG, "--topology=h100:2", "--sweep", f"--output={top}/sweep/plans.json"]
    plans = [f"--folder={top}/plans/found", f"--page={top}/plans/page.md"]
    return {
        "conversion": ("moe_jax.convert", there, "parameters", [INT]),
        "conversion again": ("moe_jax.convert", there, "none", []),
        "export killed": ("moe_jax.convert", back, "tensors", [KILL]),
        "export": ("moe_jax.convert", back, "tensors", [TERM]),
        "export again": ("moe_jax.convert", back, "none", []),
        "sweep": ("moe_jax.plan", sweep, "second plan", [INT]),
        "plans INT": ("tools.plans", plans, "planning process", [INT]),
        "plans TERM": ("tools.plans", plans, "planning process", [TERM]),
    }


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder in which everything was written, and how each command ended."""
    top = tmp_path_factory.mktemp("stopped")
    for name in ("hf", "out", "sweep", "plans"):
        (top / name).mkdir()
    recorded("mixtral", top / "hf")
    shutil.copy(ROOT / "docs" / "plans.md", top / "plans" / "page.md")
    cases = _cases(top)
    done = subprocess.run(
        [sys.executable, "-m", "tests.system.stopped_tools"],
        cwd=ROOT,
        env=environment(1),
        input=json.dumps(list(cases.values())),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    ends = [types.SimpleNamespace(code=c, out=o, err=e) for c, o, e in json.loads(done.stdout)]
    return top, dict(zip(cases, ends, strict=True))


def _names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_conversion_that_is_stopped_or_killed_leaves_no_folder_and_can_be_run_again(stopped):
    top, ends = stopped
    for name, output, code, stop in (
        ("conversion", "converted", 130, "Ctrl-C"),
        ("export", "exported", 143, "SIGTERM"),
    ):
        assert ends[name].code == code, ends[name]
        # The lines before are those of the progress bar.
        assert ends[name].err.splitlines()[-1] == (
            f"stopped by {stop}; nothing is left in {top}/out/{output}; run the same command to "
            "start again"
        )
        assert ends[f"{name} again"].code == 0, ends[f"{name} again"]
    assert ends["export killed"].code == -KILL
    assert "model.safetensors" in _names(top / "out" / "exported")
    # What the killed process has left is gone too.
    assert _names(top / "out") == {"converted", "exported"}


def test_a_sweep_that_is_stopped_writes_the_plans_that_it_has(stopped):
    top, ends = stopped
    end = ends["sweep"]
    held, line = [said for said in end.err.splitlines() if said]
    assert (end.code, end.out) == (130, "")
    assert held.startswith("Ctrl-C: the command saves its work and then ends")
    assert line.startswith("stopped by Ctrl-C; the plans so far are written; run the same command")
    assert len(json.loads((top / "sweep" / "plans.json").read_text())["plans"]) == 2
    assert _names(top / "sweep") == {"plans.json"}


@pytest.mark.parametrize(
    ("number", "name", "code"), [("INT", "Ctrl-C", 130), ("TERM", "SIGTERM", 143)]
)
def test_plans_of_published_models_end_with_the_one_under_way(stopped, number, name, code):
    top, ends = stopped
    end = ends[f"plans {number}"]
    assert (end.code, end.err) == (
        code,
        f"stopped by {name}; plans before switch_base_128.v4 are written; --only=NAME makes one "
        "plan\n",
    )
    assert _names(top / "plans") == {"page.md"}
    assert (top / "plans" / "page.md").read_text() == (ROOT / "docs" / "plans.md").read_text()
    assert not lives(int(end.out.split()[-1]))
