"""Runs a file that checks annotations, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def assert_true(module: str, **environment: str) -> None:
    """Fails with the error of ``module`` if one of the annotations that it checks is wrong.

    jaxtyping compiles a module that a checked module imports under the name of checked modules,
    without checks, and other processes would read that. So no compiled module is written here.
    """
    given = os.environ | environment | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module], cwd=ROOT, capture_output=True, text=True, env=given
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "have true annotations" in done.stdout
