"""Trains in forks that are stopped at a phase, or find the disk full; imports are paid for once.

Reads a list of cases as JSON: the arguments of ``moe_jax.train`` and, in ``phase``, where the run
is held, which signals it is sent there (``signals``), or which limit on the size of its files it
meets there (``bytes`` more than its log has). Prints, as JSON, exit codes, stdouts and stderrs.
"""

import hashlib
import json
import os
import resource
import signal
import sys
import tempfile
import time

from moe_jax import data, signals
from moe_jax.cli import common, train
from moe_jax.run import finish
from moe_jax.run.session import Session
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.metrics import MetricsWriter


def _sleep():
    time.sleep(300)


def _stay_in_c():
    # Python's handlers do not run before this returns, as in a compilation.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)


def _until_heard():
    while not signals._active.came:
        time.sleep(0.01)


def _before(owner, name, hold, ready, step=None):
    """Holds before the first call of a function, or before the record of a step."""
    wrapped = getattr(owner, name)

    def held(*arguments, **options):
        if step is None or arguments[1]["step"] == step:
            setattr(owner, name, wrapped)
            ready()
            hold()
        return wrapped(*arguments, **options)

    setattr(owner, name, held)


_PHASES = {
    "tokenizer": lambda ready: _before(data, "load_tokenizer", _sleep, ready),
    "compiling": lambda ready: _before(Session, "place", _stay_in_c, ready),
    "step 5": lambda ready: _before(MetricsWriter, "write", _until_heard, ready, 5),
    "step 7": lambda ready: _before(MetricsWriter, "write", _sleep_through, ready, 7),
    "restoring": lambda ready: _before(Checkpoints, "restore", _sleep, ready),
    "evaluation": lambda ready: _before(finish, "expert_tokens", _sleep, ready),
    "report": lambda ready: _before(finish, "write_report", _sleep, ready),
}


def _sleep_through():
    end = time.monotonic() + 300
    while time.monotonic() < end:
        time.sleep(0.01)


def _limit_files(folder, more):
    """Has the next record of the log meet the limit after a few of its bytes."""
    while not os.path.exists(f"{folder}/checkpoints/10"):
        time.sleep(0.01)
    size = os.stat(f"{folder}/metrics.jsonl").st_size if more else 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + (more or 100_000), resource.RLIM_INFINITY))


def _child(case, bell):
    # Ends a fork that waits for what never comes.
    signal.alarm(120)
    signals._ANSWER_SECONDS, signals._TWICE_SECONDS = 0.3, 0.0
    sys.argv = ["train", *case["arguments"]]
    folder = sys.argv[-1].removeprefix("--workdir=")
    if "signals" in case:
        _PHASES[case["phase"]](lambda: os.write(bell, b"!"))
    elif "bytes" in case:
        limit = lambda: _limit_files(folder, case["bytes"])  # noqa: E731
        _before(MetricsWriter, "write", limit, lambda: None, case["phase"])
    common.run(train.define, train.main)


def _forked(case):
    ready, bell = os.pipe()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = 1
            try:
                _child(case, bell)
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(bell)
        if "signals" in case:
            os.read(ready, 1)
        for number in case.get("signals", []):
            os.kill(child, number)
            # Two signals that come together are one to the system.
            time.sleep(0.2)
        _, status = os.waitpid(child, 0)
        os.close(ready)
        out.seek(0)
        err.seek(0)
        return os.waitstatus_to_exitcode(status), out.read(), err.read()


if __name__ == "__main__":
    print(json.dumps([_forked(case) for case in json.load(sys.stdin)]))
