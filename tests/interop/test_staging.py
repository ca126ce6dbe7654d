"""A folder appears whole or not at all."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax import signals
from moe_jax.errors import ConfigError
from moe_jax.interop.staging import lives, replaced, require_room


@pytest.fixture
def older(tmp_path):
    """A folder with a file that goes and one that stays."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old.safetensors").write_text("old")
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    return folder


def stale(name):
    return name.endswith(".safetensors")


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


OLD = {"old.safetensors": "old", "notes/mine.txt": "mine"}
NEW = {"new.safetensors": "new", "config.json": "{}"}


def write(folder):
    with replaced(folder, stale) as new:
        for name, text in NEW.items():
            (new / name).write_text(text)


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    write(tmp_path / "a" / "b")
    assert content(tmp_path / "a") == {f"b/{name}": text for name, text in NEW.items()}


@pytest.mark.parametrize("mounted", [False, True])
def test_stale_files_go_and_others_stay(older, monkeypatch, mounted):
    monkeypatch.setattr(Path, "is_mount", lambda self: mounted)
    write(older)
    assert content(older) == NEW | {"notes/mine.txt": "mine"}
    assert [path.name for path in older.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_the_older_folder_and_nothing_else(older, error):
    with pytest.raises(type(error)), replaced(older, stale) as new:
        (new / "half").write_text("half")
        raise error
    assert content(older.parent) == {f"out/{name}": text for name, text in OLD.items()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_command_leaves_the_older_folder(older, number):
    with (
        pytest.raises(signals.Interrupted),
        signals.listening(lambda *_: None),
        replaced(older, stale) as new,
    ):
        (new / "half").write_text("half")
        os.kill(os.getpid(), number)
        raise AssertionError("the handler runs before this line")
    assert content(older.parent) == {f"out/{name}": text for name, text in OLD.items()}


def test_what_a_killed_writer_left_is_cleared_away(older):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine = f".out.{socket.gethostname()}"
    (older.parent / f"{mine}.{gone.pid}.abc").mkdir()
    living = older.parent / f"{mine}.{os.getppid()}.abc"
    living.mkdir()
    other = older.parent / f".out.another-host.{gone.pid}.abc"
    other.mkdir()
    write(older)
    assert {path.name for path in older.parent.iterdir()} == {"out", living.name, other.name}


def test_a_writer_killed_between_two_renames_loses_no_older_folder(older):
    # The older folder is aside, the new one is not yet in its place.
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    older.rename(older.parent / f".out.{socket.gethostname()}.{gone.pid}.abc.old")
    with pytest.raises(OSError), replaced(older, stale):
        raise OSError("disk full")
    assert content(older) == OLD


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match="out is a file, not a folder"):
        write(tmp_path / "out")


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path):
    require_room(tmp_path / "a" / "b", 1)
    with pytest.raises(ConfigError, match=r"needs 1000000000.0 GB and its disk has .* GB free"):
        require_room(tmp_path / "a" / "b", 10**18)
    assert not (tmp_path / "a").exists()


def test_a_process_that_ended_without_a_reaper_does_not_live():
    assert lives(os.getpid())
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    process.stdout.read()  # its end closes the pipe
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie from now on
    os.kill(process.pid, 0)
    assert not lives(process.pid)
    process.wait()
    assert not lives(process.pid)
