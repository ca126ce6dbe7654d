"""Several processes of one run, on this machine alone, each with devices of its own."""

import json
import socket
import subprocess
import sys
import time

from tests.system.runs import CONFIG, ROOT, TIMEOUT, environment


class Hosts:
    """A run of so many processes; they wait once a step is logged, until they are released."""

    def __init__(self, workdir, count, *arguments, devices=8, hold=0):
        self._workdir, self._hold = workdir, hold
        self._brake = workdir.with_suffix(".brake")
        if hold:
            self._brake.touch()
        where = _where(count)
        command = [sys.executable, "-m", "tests.system.traced", hold, self._brake, trace(workdir)]
        command += [CONFIG, f"--workdir={workdir}", *arguments]
        self._files = [(_file(workdir, i, "out"), _file(workdir, i, "err")) for i in range(count)]
        self.processes = [
            subprocess.Popen(
                [*map(str, command), *(flag.format(index) for flag in where)],
                cwd=ROOT,
                env=environment(devices // count),
                stdout=out.open("w"),
                stderr=err.open("w"),
            )
            for index, (out, err) in enumerate(self._files)
        ]

    def wait_for(self, checkpoint):
        """Waits until a step is logged and a checkpoint committed."""
        metrics, saved = self._workdir / "metrics.jsonl", self._workdir / "checkpoints"
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end and all(process.poll() is None for process in self.processes):
            logged = metrics.exists() and f'"step": {self._hold},' in metrics.read_text()
            if logged and (saved / str(checkpoint)).exists():
                return
            time.sleep(0.02)
        self.stop()
        raise AssertionError(f"step {self._hold} never came: {self._said()}")

    def release(self):
        """Lets the processes go on."""
        self._brake.unlink()

    def end(self, seconds=TIMEOUT):
        """Waits for the end of all; their exit codes, stdouts and stderrs."""
        end = time.monotonic() + seconds
        try:
            for process in self.processes:
                process.wait(timeout=end - time.monotonic())
        finally:
            self.stop()
        return [
            (process.returncode, *said)
            for process, said in zip(self.processes, self._said(), strict=True)
        ]

    def finish(self):
        """Waits for the end of all, which must be good; the stdout of the first."""
        ends = self.end()
        assert [code for code, _, _ in ends] == [0] * len(ends), ends
        return ends[0][1]

    def stop(self):
        """Kills what still runs."""
        for process in self.processes:
            process.kill()
            process.wait()

    def _said(self):
        return [(out.read_text(), err.read_text()) for out, err in self._files]


def traced(workdir, done, step):
    """The digests of the state that was saved or restored at a step: one per array."""
    lines = [json.loads(line) for line in trace(workdir).read_text().splitlines()]
    return next(digests for what, at, digests in lines if (what, at) == (done, step))


def trace(workdir):
    """The file of a run's digests."""
    return workdir.with_suffix(".trace")


def _file(workdir, index, name):
    return workdir.with_suffix(f".{index}.{name}")


def _where(count):
    if count == 1:
        return []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"--coordinator=127.0.0.1:{port}"
    return ["--distributed", address, f"--num_processes={count}", "--process_id={}"]
