"""Runs one command line many times, each in a fork, so that its imports are paid for once.

Reads a list of argument lists as JSON and prints, as JSON, each exit code, stdout and stderr.
"""

import json
import sys

from moe_jax.cli import common, train
from tests.system.forks import forked


def _run(arguments):
    sys.argv = ["train", *arguments]
    common.run(train.define, train.main)


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    print(json.dumps([forked(lambda case=case: _run(case)) for case in cases]))
