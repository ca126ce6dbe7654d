"""Ctrl-C and SIGTERM: a command ends in order with one line, and saves its work first if it must.

Python runs the handler of a signal in the main thread, between two instructions of Python. A
compilation can keep the main thread in C for minutes, so a second thread listens too: it ends the
process if the main thread does not react, or if a second signal comes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
ADVICE = "run the same command to start again"
# Longest time that the main thread may stay in C, and longest time between two signals that count
# as one: a terminal sends Ctrl-C to a runner and to its children, and the runner passes it on.
_ANSWER_SECONDS, _TWICE_SECONDS = 5.0, 1.0
_HELD = "\n{}: the command saves its work and then ends; a second signal ends it at once\n"

# Prints the last line of a process, given its exit code and the line.
LastWords = Callable[[int, str], None]


class Interrupted(BaseException):
    """A signal asks the command to end; the class is no ``Exception``, so that no handler stops it.

    Attributes:
        number: Number of the signal.
    """

    def __init__(self, number: int, detail: str = ""):
        super().__init__(f"stopped by {NAMES[number]}{detail}")
        self.number = number

    @property
    def code(self) -> int:
        """The exit code that shells give to a process that a signal has ended."""
        return 128 + self.number


class _Listener:
    """The first signal that has come, and the reaction of the process to it.

    Attributes:
        came: Number of the signal that has come, or 0.
        advice: End of the last line, which says how to continue.
        last_words: Prints the last line if the main thread cannot.
        on_second: Functions to call before a second signal ends the process.
        held: True if a signal waits until the process has saved its work.
        silent: True if a signal that waits prints no line, because it waits for an instant.
    """

    def __init__(self, last_words: LastWords):
        self.came = 0
        self.advice = ADVICE
        self.last_words = last_words
        self.on_second: list[Callable[[], None]] = []
        self.held = False
        self.silent = False
        self._answered = threading.Event()

    def hear(self, number: int, _: object) -> None:
        """Handles a signal in the main thread: raises ``Interrupted`` unless signals are held."""
        self._answered.set()
        if self.came:
            return
        self.came = number
        if not self.held:
            raise Interrupted(number)
        if number == signal.SIGINT and not self.silent:
            # A person waits for a reaction. The signal may have interrupted a ``print``.
            os.write(2, _HELD.format(NAMES[number]).encode())

    def watch(self, bell: socket.socket) -> None:
        """Ends the process if a second signal comes, or the main thread does not react to one."""
        first = 0.0
        while number := int.from_bytes(bell.recv(1)):
            if number not in NAMES:
                continue
            if not first:
                first = time.monotonic()
                threading.Thread(target=self._expect, args=(number,), daemon=True).start()
            elif time.monotonic() - first > _TWICE_SECONDS:
                for act in self.on_second:
                    act()
                self._end(number, " a second time, nothing more is saved")

    def _expect(self, number: int) -> None:
        if not self.held and not self._answered.wait(_ANSWER_SECONDS):
            self._end(number, "")

    def _end(self, number: int, detail: str) -> None:
        stop = Interrupted(number, detail)
        with contextlib.suppress(SystemExit):
            self.last_words(stop.code, f"{stop}; {self.advice}")
        os._exit(stop.code)


_active: _Listener | None = None


def end_imports() -> None:
    """Makes Ctrl-C and SIGTERM end the process with one line, until ``listening`` begins.

    Until then a command imports modules, which takes seconds and leaves nothing to save.
    """

    def end(number: int, _: object) -> None:
        stop = Interrupted(number)
        os.write(2, f"{stop}; {ADVICE}\n".encode())
        os._exit(stop.code)

    if threading.current_thread() is not threading.main_thread():
        return
    for number in NAMES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


@contextlib.contextmanager
def listening(last_words: LastWords) -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM into ``Interrupted``; a second signal ends the process at once.

    A signal that the process ignores from its start, as in the background of a script, stays
    ignored. Only the main thread can listen: in another thread, and inside another ``listening``,
    the block runs unchanged.

    Args:
        last_words: Function that prints a line if the main thread cannot, and may end the process;
            its arguments are the exit code and the line.
    """
    global _active
    if _active or threading.current_thread() is not threading.main_thread():
        yield
        return
    listener = _active = _Listener(last_words)
    bell, rung = socket.socketpair()
    rung.setblocking(False)
    before = {number: signal.getsignal(number) for number in NAMES}
    before_bell = signal.set_wakeup_fd(rung.fileno(), warn_on_full_buffer=False)
    watch = threading.Thread(target=listener.watch, args=(bell,), name="signals", daemon=True)
    watch.start()
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, listener.hear)
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) == listener.hear:
                signal.signal(number, handler)
        signal.set_wakeup_fd(before_bell)
        _active = None
        rung.close()
        watch.join()
        bell.close()


def advise(advice: str) -> None:
    """Changes the advice at the end of the last line; it is a sentence without its full stop."""
    if _active:
        _active.advice = advice


def advice() -> str:
    """Returns the advice at the end of the last line, which says how to continue."""
    return _active.advice if _active else ADVICE


@contextlib.contextmanager
def second_time(act: Callable[[], None]) -> Iterator[None]:
    """Calls ``act`` in another thread before a second signal in the block ends the process."""
    if not _active:
        yield
        return
    _active.on_second.append(act)
    try:
        yield
    finally:
        _active.on_second.remove(act)


class Hold:
    """Delay of signals: after ``begin``, a signal waits until the process has saved its work."""

    def begin(self, *, silently: bool = False) -> None:
        """Delays signals from now on; ``silently`` prints no line when one comes."""
        if _active:
            _active.held, _active.silent = True, silently

    @property
    def came(self) -> int:
        """The number of the signal that has come, or 0."""
        return _active.came if _active else 0


@contextlib.contextmanager
def holding() -> Iterator[Hold]:
    """Yields a ``Hold``, which ends with the block.

    Raises:
        Interrupted: At the end of the block, if a signal has come.
    """
    try:
        yield Hold()
    finally:
        if _active:
            _active.held = _active.silent = False
    if _active and _active.came:
        raise Interrupted(_active.came)


@contextlib.contextmanager
def passing_on(number: int) -> Iterator[Callable[[], int]]:
    """Sends this process the signal ``number`` for each Ctrl-C, for a library that waits for it.

    Args:
        number: Number of the signal.

    Yields:
        A function that returns the number of the signal that came as Ctrl-C, or 0.
    """
    came: list[int] = []

    def pass_on(received: int, _: object) -> None:
        came.append(received)
        os.kill(os.getpid(), number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = signal.getsignal(signal.SIGINT)
    with holding() as hold:
        # The library that waits for the other signal reacts to this one.
        hold.begin()
        if before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, pass_on)
        try:
            yield lambda: came[0] if came else 0
        finally:
            signal.signal(signal.SIGINT, before)
