"""Trains like ``moe_jax.train`` and holds, once a step is logged, for as long as a file exists."""

import sys
import time
from pathlib import Path

from moe_jax.cli import common, train
from moe_jax.training.metrics import MetricsWriter

_STEP, _BRAKE = int(sys.argv.pop(1)), Path(sys.argv.pop(1))
_write = MetricsWriter.write


def _write_and_hold(self, record):
    _write(self, record)
    while record["step"] == _STEP and _BRAKE.exists():
        time.sleep(0.02)


if __name__ == "__main__":
    MetricsWriter.write = _write_and_hold
    common.run(train.define, train.main)
