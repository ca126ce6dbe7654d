"""Starts the command lines as a user does: own processes, own devices, a clean environment."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from moe_jax.run.restored import open_restored
from moe_jax.run.session import open_checkpoints
from moe_jax.training.metrics import read_metrics
from moe_jax.training.state import named_leaves
from tests.data.corpora import write_corpus
from tests.xla import QUICK

ROOT = Path(__file__).parents[2]
CONFIG = "--config=tests/system/tiny.py"
# Long enough for the slowest machine; nothing waits for it where the code is right.
TIMEOUT = 300
# Programs of one shape are compiled once, and cheaply; every run still loads and runs its own.
_CACHE = tempfile.TemporaryDirectory(prefix="moe_jax-tests-")
_XLA = " ".join((*QUICK, "--xla_llvm_disable_expensive_passes=true"))
_COMPILATION = {
    "JAX_COMPILATION_CACHE_DIR": _CACHE.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
_WORDS = ("def", "return", "for", "while", "if", "else", "import", "self", "None", "True", "x", "i")


def write_text(folder):
    """Writes a small corpus and returns the name of its source."""
    rng = random.Random(0)

    def document(lines):
        words = ((rng.choice(_WORDS) for _ in range(rng.randint(1, 6))) for _ in range(lines))
        return "\n".join(map(" ".join, words)) + "\n"

    folder.mkdir()
    train = [document(rng.randint(4, 40)) for _ in range(40)]
    return write_corpus(folder, train, [document(12) for _ in range(6)])


def environment(devices):
    """Only what a program needs, and so many simulated devices."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    flags = f"--xla_force_host_platform_device_count={devices} {_XLA}"
    return {**kept, **_COMPILATION, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def command(module, *arguments, devices=1):
    """Runs a module to its end; its exit code, stdout and stderr."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def train(workdir, *arguments, devices=1):
    """Trains to the end and returns the finished process."""
    done = command("moe_jax.train", f"--workdir={workdir}", *arguments, devices=devices)
    assert done.returncode == 0, done.stderr
    return done


class Braked:
    """A training process that waits, once a step is logged, until it is released or killed."""

    def __init__(self, workdir, step, *arguments, devices=1):
        self._brake = workdir.with_suffix(".brake")
        self._brake.touch()
        self._workdir, self._step = workdir, step
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.system.braked", str(step), self._brake]
            + [f"--workdir={workdir}", *arguments],
            cwd=ROOT,
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, checkpoint):
        """Waits until the process has logged its step and committed a checkpoint."""
        metrics = self._workdir / "metrics.jsonl"
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end and self.process.poll() is None:
            logged = metrics.exists() and f'"step": {self._step}' in metrics.read_text()
            if logged and (self._workdir / "checkpoints" / str(checkpoint)).exists():
                return
            time.sleep(0.02)
        self.process.kill()
        raise AssertionError(f"step {self._step} never came: {self.process.communicate()}")

    def signal(self, number):
        """Sends a signal, lets the process go on and returns exit code, stdout and stderr."""
        self.process.send_signal(number)
        self._brake.unlink()
        out, err = self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode, out, err


_CLOCK = ("tokens_per_second", "model_flops_per_second", "mfu")


def kill_and_resume(folder, whole, *flags, devices=1):
    """Kills a run of 30 steps after step 20, resumes it, and compares it with a whole run."""
    process = Braked(folder, 25, *flags, devices=devices)
    process.wait_for(checkpoint=20)
    assert process.signal(signal.SIGKILL)[0] == -signal.SIGKILL
    assert "resuming at step 20 of 30" in train(folder, *flags, devices=devices).stdout
    assert_same(folder, whole)


def records(workdir, kind="train"):
    """The records of one kind, less what depends on the clock."""
    return [
        {name: value for name, value in record.items() if name not in _CLOCK}
        for record in read_metrics(workdir)
        if record["kind"] == kind
    ]


def final(workdir):
    """Step, every array and the position in the data of the newest checkpoint."""
    step, session, state = open_restored(workdir, average=False)
    with open_checkpoints(session.experiment, workdir / "checkpoints") as checkpoints:
        position = checkpoints.restore(named_leaves(session.abstract))[2]
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}
    return step, leaves, json.dumps(position, sort_keys=True)


def assert_same(workdir, reference):
    """Asserts that two runs ended alike, to the last bit, and logged the same."""
    step, leaves, position = final(workdir)
    expected_step, expected, expected_position = final(reference)
    assert step == expected_step
    assert leaves.keys() == expected.keys()
    different = [name for name in leaves if leaves[name].tobytes() != expected[name].tobytes()]
    assert not different
    assert position == expected_position
    assert records(workdir) == records(reference)
    assert records(workdir, "eval") == records(reference, "eval")
    assert [record["step"] for record in records(workdir)] == list(range(1, step + 1))


def error_line(done):
    """The one line that a failed command wrote to stderr."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line
