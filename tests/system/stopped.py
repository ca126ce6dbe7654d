"""Trains in forks that are stopped at a phase, or find the disk full; imports are paid for once.

Reads a list of cases as JSON: the arguments of ``moe_jax.train`` and, in ``phase``, where the run
is held, which signals it is sent there (``signals``), or which limit on the size of its files it
meets there (``bytes`` more than its log has). Prints, as JSON, exit codes, stdouts and stderrs.
"""

import hashlib
import json
import os
import resource
import sys
import time

from moe_jax import data
from moe_jax.cli import common, train
from moe_jax.run import finish
from moe_jax.run.session import Session
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.metrics import MetricsWriter
from tests.system.forks import before, signalled, sleep, until_heard


def _stay_in_c():
    # Python's handlers do not run before this returns, as in a compilation.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)


def _sleep_through():
    end = time.monotonic() + 300
    while time.monotonic() < end:
        time.sleep(0.01)


def _before_record(step, hold, ready):
    before(MetricsWriter, "write", hold, ready, lambda _, record: record["step"] == step)


_PHASES = {
    "tokenizer": lambda ready: before(data, "load_tokenizer", sleep, ready),
    "compiling": lambda ready: before(Session, "place", _stay_in_c, ready),
    "step 5": lambda ready: _before_record(5, until_heard, ready),
    "step 7": lambda ready: _before_record(7, _sleep_through, ready),
    "restoring": lambda ready: before(Checkpoints, "restore", sleep, ready),
    "evaluation": lambda ready: before(finish, "expert_tokens", sleep, ready),
    "report": lambda ready: before(finish, "_write_report", sleep, ready),
}


def _limit_files(folder, more):
    """Has the next record of the log meet the limit after a few of its bytes."""
    while not os.path.exists(f"{folder}/checkpoints/10"):
        time.sleep(0.01)
    size = os.stat(f"{folder}/metrics.jsonl").st_size if more else 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + (more or 100_000), resource.RLIM_INFINITY))


def _train(case, ready):
    sys.argv = ["train", *case["arguments"]]
    folder = sys.argv[-1].removeprefix("--workdir=")
    if "signals" in case:
        _PHASES[case["phase"]](ready)
    elif "bytes" in case:
        _before_record(case["phase"], lambda: _limit_files(folder, case["bytes"]), lambda: None)
    common.run(train.define, train.main)


def _run(case):
    return signalled(lambda ready: _train(case, ready), case.get("signals", []))


if __name__ == "__main__":
    print(json.dumps([_run(case) for case in json.load(sys.stdin)]))
