"""Runs something in forks of this process, so that its imports are paid for once."""

import os
import signal
import sys
import tempfile
import time

from moe_jax import signals


def forked(act, started=lambda child: None):
    """Calls ``act`` in a fork, and ``started`` here; exit code, stdout and stderr of the fork."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            _become(act, out, err)
        started(child)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return os.waitstatus_to_exitcode(status), out.read(), err.read()


def _become(act, out, err):
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    code = 1
    try:
        act()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def signalled(act, numbers):
    """Calls ``act(ready)`` in a fork, which is sent signals once it has called ``ready``."""
    heard, bell = os.pipe()

    def send(child):
        os.close(bell)
        if numbers:
            os.read(heard, 1)
        for number in numbers:
            os.kill(child, number)
            # Two signals that come together are one to the system.
            time.sleep(0.2)

    def acted():
        # Ends a fork that waits for what never comes.
        signal.alarm(120)
        signals._ANSWER_SECONDS, signals._TWICE_SECONDS = 0.3, 0.0
        act(lambda: os.write(bell, b"!"))

    try:
        return forked(acted, send)
    finally:
        os.close(heard)


def sleep():
    time.sleep(300)


def until_heard():
    while not signals._active.came:
        time.sleep(0.01)


def before(owner, name, hold, ready, chosen=lambda *_, **__: True):
    """Holds, once, before a call of a function with chosen arguments."""
    wrapped = getattr(owner, name)

    def held(*arguments, **options):
        if chosen(*arguments, **options):
            setattr(owner, name, wrapped)
            ready()
            hold()
        return wrapped(*arguments, **options)

    setattr(owner, name, held)
