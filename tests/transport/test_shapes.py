"""The shapes and types in the annotations of transport and parallel are true for every row."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_annotations_are_true_for_every_row_of_the_table():
    command = [sys.executable, "-m", "tests.transport.checked_shapes"]
    root = Path(__file__).parents[2]
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, env=os.environ | devices
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "have true annotations" in done.stdout
