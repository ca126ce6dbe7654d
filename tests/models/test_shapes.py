"""The shapes and types in the annotations of ``moe_jax.models`` are true for both models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_annotations_are_true_for_both_models():
    command = [sys.executable, "-m", "tests.models.checked_shapes"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "have true annotations" in done.stdout
