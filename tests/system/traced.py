"""Trains like ``moe_jax.train``, tells which states it saves and restores, and holds at a step.

Each state is one line of JSON: what was done, the step, and the SHA-256 of every whole array.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.cli import common, train
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.metrics import MetricsWriter

_STEP, _BRAKE, _TRACE = int(sys.argv.pop(1)), Path(sys.argv.pop(1)), Path(sys.argv.pop(1))
_save, _restore, _write = Checkpoints.save, Checkpoints.restore, MetricsWriter.write


def _tell(done, step, state):
    mesh = next(iter(state.values())).sharding.mesh
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(state)
    digests = {
        name: hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for name, x in whole.items()
    }
    if jax.process_index() == 0:
        with _TRACE.open("a") as file:
            file.write(json.dumps([done, step, digests]) + "\n")


def _save_and_tell(self, step, state, data_state):
    _tell("saved", step, state)
    _save(self, step, state, data_state)


def _restore_and_tell(self, like, **chosen):
    found = _restore(self, like, **chosen)
    if found is not None:
        _tell("restored", *found[:2])
    return found


def _write_and_hold(self, record):
    _write(self, record)
    while record["step"] == _STEP and _BRAKE.exists():
        time.sleep(0.02)


if __name__ == "__main__":
    Checkpoints.save, Checkpoints.restore = _save_and_tell, _restore_and_tell
    MetricsWriter.write = _write_and_hold
    common.run(train.define, train.main)
