"""Signals that this process sends to itself."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from moe_jax import signals
from moe_jax.signals import Interrupted


def _none(code, line):
    raise AssertionError(line)


@pytest.mark.parametrize(
    ("number", "name", "code"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)]
)
def test_a_signal_is_raised_with_its_name_and_the_exit_code_of_shells(number, name, code):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"stopped by {name}") as stop, signals.listening(_none):
        os.kill(os.getpid(), number)
        raise AssertionError("the handler runs before this line")
    assert stop.value.code == code
    assert not isinstance(stop.value, Exception)
    assert signal.getsignal(number) == before


def test_a_held_signal_is_noted_and_raised_at_the_end_of_the_hold(capfd):
    after = []
    with pytest.raises(Interrupted), signals.listening(_none), signals.holding() as hold:
        hold.begin()
        assert hold.came == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert hold.came == signal.SIGINT
        after.append("goes on")
    assert after == ["goes on"]
    assert "a second signal ends it at once" in capfd.readouterr().err


def test_a_silent_hold_prints_no_line(capfd):
    with pytest.raises(Interrupted), signals.listening(_none), signals.holding() as hold:
        hold.begin(silently=True)
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == ""


def test_a_hold_that_has_not_begun_raises_at_once():
    with pytest.raises(Interrupted), signals.listening(_none), signals.holding():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the handler runs before this line")


def test_two_signals_that_come_together_count_as_one(monkeypatch):
    monkeypatch.setattr(signals, "_TWICE_SECONDS", 60.0)
    with pytest.raises(Interrupted), signals.listening(_none), signals.holding() as hold:
        hold.begin()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.listening(_none):
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_does_not_listen():
    def listen():
        with signals.listening(_none):
            found.append(signals.advice())

    found = []
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [signals.ADVICE]


def test_ctrl_c_is_passed_on_as_the_signal_that_another_handler_waits_for():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with signals.passing_on(signal.SIGTERM) as own:
            assert own() == 0
            os.kill(os.getpid(), signal.SIGINT)
            assert (own(), heard) == (signal.SIGINT, [signal.SIGTERM])
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("module", ["moe_jax.train", "moe_jax.ablate"])
@pytest.mark.parametrize(
    ("number", "name", "code"), [("SIGINT", "Ctrl-C", 130), ("SIGTERM", "SIGTERM", 143)]
)
def test_a_signal_while_a_command_imports_is_one_line(tmp_path, module, number, name, code):
    # A package of this name that is found first, and is hit as it is imported.
    (tmp_path / "jax.py").write_text(f"import os, signal; os.kill(os.getpid(), signal.{number})")
    done = subprocess.run(
        [sys.executable, "-m", module],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"stopped by {name}; run the same command to start again\n"
