"""Ctrl-C and SIGTERM: a command ends in order with one line, or saves first where it has to.

Python runs a signal's handler in the main thread, and only between two of its own instructions. A
compilation may keep the main thread in C for minutes, so a second thread listens too: it ends the
process where the main thread does not answer, and where a second signal comes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
ADVICE = "run the same command to start again"
# How long the main thread may stay in C, and how close two signals count as one: a terminal sends
# Ctrl-C to a runner and to its children, and the runner passes it on.
_ANSWER_SECONDS, _TWICE_SECONDS = 5.0, 1.0
_HELD = "\n{}: what is under way is finished and saved first; once more ends at once\n"

LastWords = Callable[[int, str], None]


class Interrupted(BaseException):
    """A signal asks the command to end; no ``except Exception`` may stop that.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int, detail: str = ""):
        super().__init__(f"stopped by {NAMES[number]}{detail}")
        self.number = number

    @property
    def code(self) -> int:
        """The exit code that shells give a process which a signal has ended."""
        return 128 + self.number


class _Listener:
    """What has come, and whether it waits until a step is saved."""

    def __init__(self, last_words: LastWords):
        self.came = 0
        self.advice = ADVICE
        self.last_words = last_words
        self.on_second: list[Callable[[], None]] = []
        self.held = False
        self._answered = threading.Event()

    def hear(self, number: int, _: object) -> None:
        """Notes the first signal, and raises it unless it is held; in the main thread."""
        self._answered.set()
        if self.came:
            return
        self.came = number
        if not self.held:
            raise Interrupted(number)
        if number == signal.SIGINT:
            # A person waits. ``print`` may be what the signal has interrupted.
            os.write(2, _HELD.format(NAMES[number]).encode())

    def watch(self, bell: socket.socket) -> None:
        """Ends the process for a second signal, or for one that is not answered."""
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
    """Has Ctrl-C and SIGTERM end the process with one line, until ``listening`` begins.

    A command is at its imports then, which take seconds and have nothing to put in order.
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
    """Turns Ctrl-C and SIGTERM into ``Interrupted``; a second one ends the process at once.

    A signal that the process ignores from its start, as in the background of a script, stays
    ignored. Only the main thread can listen; elsewhere, and inside another ``listening``, this does
    nothing.

    Args:
        last_words: prints a line where the main thread cannot, and may end the process; its first
            argument is the exit code.
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
    """Changes how the last line says to go on; a sentence without its full stop."""
    if _active:
        _active.advice = advice


def advice() -> str:
    """Returns how to go on."""
    return _active.advice if _active else ADVICE


@contextlib.contextmanager
def second_time(act: Callable[[], None]) -> Iterator[None]:
    """Has ``act`` called, in another thread, before a second signal ends the process."""
    if not _active:
        yield
        return
    _active.on_second.append(act)
    try:
        yield
    finally:
        _active.on_second.remove(act)


class Hold:
    """Once begun, signals are noted and not raised: there is something to save first."""

    def begin(self) -> None:
        """Holds signals back from now on."""
        if _active:
            _active.held = True

    @property
    def came(self) -> int:
        """The number of the signal that has come, or 0."""
        return _active.came if _active else 0


@contextlib.contextmanager
def holding() -> Iterator[Hold]:
    """Yields a ``Hold`` that ends with the block.

    Raises:
        Interrupted: at its end, if a signal came in the block and nothing has ended it.
    """
    try:
        yield Hold()
    finally:
        if _active:
            _active.held = False
    if _active and _active.came:
        raise Interrupted(_active.came)


@contextlib.contextmanager
def passing_on(number: int) -> Iterator[Callable[[], int]]:
    """Sends Ctrl-C on to this process as signal ``number``, which something else waits for.

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
        # What waits for the other signal answers this one.
        hold.begin()
        if before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, pass_on)
        try:
            yield lambda: came[0] if came else 0
        finally:
            signal.signal(signal.SIGINT, before)
