"""Runs one command line many times, each in a fork, so that its imports are paid for once.

Reads a list of argument lists as JSON and prints, as JSON, each exit code, stdout and stderr.
"""

import json
import os
import sys
import tempfile

from moe_jax.cli import common, train


def _forked(arguments):
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv = ["train", *arguments]
            code = 1
            try:
                common.run(train.define, train.main)
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return os.waitstatus_to_exitcode(status), out.read(), err.read()


if __name__ == "__main__":
    print(json.dumps([_forked(arguments) for arguments in json.load(sys.stdin)]))
