"""The script for GPUs runs its parts on any machine, and records what fails."""

import json

from moe_jax.cli import common
from tools import gpu


def test_all_parts_take_at_most_eight_minutes():
    assert sum(part.seconds for part in gpu.PARTS) <= 480
    assert len({part.name for part in gpu.PARTS}) == len(gpu.PARTS)


def test_a_part_that_fails_or_takes_too_long_is_recorded(tmp_path):
    fails = gpu.run(gpu.Part("fails", ("no_such_module",), (), 60), tmp_path, False)
    assert fails["outcome"] == "exit status 1"
    assert "no_such_module" in fails["last_lines"][-1]
    server = ("http.server", "0", "--bind=127.0.0.1")
    late = gpu.run(gpu.Part("late", server, (), 1), tmp_path, False)
    assert late["outcome"] == "not done after 1 s"
    assert late["results"] == []


def run(*arguments):
    try:
        common.run(gpu.define, gpu.main, ["tools.gpu", *arguments])
    except SystemExit as stop:
        return stop.code
    return 0


def test_without_a_gpu_it_names_the_rehearsal(tmp_path, capsys):
    assert run(f"--output={tmp_path}") == 2
    assert "no GPU here, but cpu: --rehearse" in capsys.readouterr().out
    assert [*tmp_path.iterdir()] == []


def test_every_part_runs_in_a_rehearsal(tmp_path):
    assert run("--rehearse", f"--output={tmp_path}") == 0
    report = json.loads((tmp_path / "cpu.json").read_text())
    assert {name: part["outcome"] for name, part in report["parts"].items()} == {
        part.name: "done" for part in gpu.PARTS
    }
    kernels = report["parts"]["kernels_bfloat16"]["results"]
    assert {row["name"] for row in kernels if not row["skipped"]} >= {
        "moe_jax/ragged/loop",
        "moe_jax/ragged/blocks",
        "moe_jax/ragged/ragged_dot",
    }
    steps = [row["step"] for row in report["parts"]["quickstart"]["results"] if "step" in row]
    assert max(steps) == 10
    assert report["parts"]["ablation"]["results"]
