"""Times the two commands of the README as a new user runs them.

``python -m tools.two_commands`` clones the committed project into an empty folder, without cached
packages or datasets. It runs ``make train`` in the clone, then ``make train`` again with another
workdir (packages installed, corpus prepared), then ``make test``, and writes ``two_commands.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from absl import flags

from moe_jax.cli import common
from moe_jax.files import write_json
from moe_jax.run.workdir import RESULT


def timed(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[float, str]:
    """Runs ``command`` in ``folder`` and returns its seconds and its last line of output."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    seconds = round(time.perf_counter() - began, 1)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise SystemExit("\n".join([*lines[-40:], f"error: {command} failed after {seconds} s"]))
    return seconds, lines[-1]


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "output", "experiments/results/two_commands.json", "File of the result.", flag_values=values
    )


def main(given: flags.FlagValues) -> None:
    """Clones the project, times the commands and writes the result."""
    with tempfile.TemporaryDirectory() as name:
        clone, cache = Path(name) / "moe_jax", Path(name) / "cache"
        subprocess.run(["git", "clone", "--quiet", ".", clone], check=True)
        environment = os.environ | {
            "PIP_NO_CACHE_DIR": "1",
            "TFDS_DATA_DIR": str(cache),
            "PATH": os.defpath + os.pathsep + os.environ["PATH"],
        }
        environment.pop("VIRTUAL_ENV", None)
        first, _ = timed(["make", "train"], clone, environment)
        again, _ = timed(["make", "train", "WORKDIR=runs/again"], clone, environment)
        tests, summary = timed(["make", "test"], clone, environment)
        result = json.loads((clone / "runs" / "quickstart" / RESULT).read_text())
        commit = ["git", "rev-parse", "--short", "HEAD"]
        times = {
            "commit": subprocess.check_output(commit, cwd=clone, text=True).strip(),
            "cpu_cores": len(os.sched_getaffinity(0)),
            "make_train_seconds": first,
            "make_train_installed_seconds": again,
            "make_test_installed_seconds": tests,
            "tests": summary.strip("= "),
            "bits_per_byte": result["bits_per_byte"],
        }
    write_json(Path(given.output), times)
    print(json.dumps(times, indent=2))


if __name__ == "__main__":
    common.run(define, main)
