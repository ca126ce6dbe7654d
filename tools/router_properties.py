"""Counts and times the property suite: every preset, transport and property.

``python -m tools.router_properties`` runs the suite in one process and writes ``properties.json``:
the number of combinations, the number of declared exceptions, and the seconds.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

from absl import flags

from moe_jax.cli import common
from moe_jax.files import write_json
from moe_jax.routing import PRESETS

SUITE = ("tests/routing/test_properties.py", "tests/transport/test_transports.py")
_COUNT = re.compile(r"(\d+) = (\d+) preset x transport x property - (\d+) declared")


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "output",
        "experiments/results/routers/properties.json",
        "File of the result.",
        flag_values=values,
    )


def main(given: flags.FlagValues) -> None:
    """Runs the suite and writes its counts."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--quiet", *SUITE], stdout=subprocess.PIPE, text=True
    )
    seconds = round(time.perf_counter() - began, 1)
    if done.returncode:
        raise SystemExit(done.stdout)
    ran, product, declared = map(int, _COUNT.search(done.stdout).groups())
    counts = {
        "presets": len(PRESETS),
        "preset_x_transport_x_property": product,
        "declared_exceptions": declared,
        "run": ran,
        "seconds": seconds,
    }
    write_json(Path(given.output), counts)
    print(counts)


if __name__ == "__main__":
    common.run(define, main)
