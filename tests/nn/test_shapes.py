"""The shapes and types in the annotations of ``moe_jax.nn`` are true in models of every kind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_annotations_are_true_in_models_of_every_kind():
    command = [sys.executable, "-m", "tests.nn.checked_shapes"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "have true annotations" in done.stdout
