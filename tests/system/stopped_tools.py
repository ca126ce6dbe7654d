"""Runs commands that write one result in forks, each stopped at a phase.

Reads a list of cases as JSON: ``[module, arguments, phase, signals]``. Prints, as JSON, exit codes,
stdouts and stderrs.
"""

import itertools
import json
import runpy
import subprocess
import sys

from orbax.checkpoint import v1 as ocp

from moe_jax.interop.huggingface import files
from moe_jax.planning import plan
from tests.system.forks import before, signalled, sleep, until_heard


def _at_second_plan(ready):
    calls = itertools.count()
    before(plan, "plan", until_heard, ready, lambda *_, **__: next(calls) == 1)


def _at_planning_process(ready):
    """Has the command start a process that takes long, and prints its number.

    The signal comes before the command has got the process.
    """
    start = subprocess.Popen

    def started(_, **options):
        process = start(["sleep", "300"], **options)
        print(process.pid, flush=True)
        ready()
        until_heard()
        return process

    subprocess.Popen = started


_PHASES = {
    "none": lambda ready: None,
    "parameters": lambda ready: before(ocp, "save_pytree", sleep, ready),
    "tensors": lambda ready: before(files, "save_file", sleep, ready),
    "second plan": _at_second_plan,
    "planning process": _at_planning_process,
}


def _run(module, arguments, phase, numbers):
    def command(ready):
        sys.argv = [module, *arguments]
        _PHASES[phase](ready)
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    return signalled(command, numbers)


if __name__ == "__main__":
    print(json.dumps([_run(*case) for case in json.load(sys.stdin)]))
