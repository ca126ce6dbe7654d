"""Writes that the system refuses: a limit on the size of a file acts as a full disk does."""

import contextlib
import resource

import pytest

from moe_jax.errors import ConfigError
from moe_jax.files import Appended, WriteError, check_file, naming, replaced


@contextlib.contextmanager
def _limit(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_refused_replacement_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "deep" / "x.json"
    with replaced(path) as temporary:
        temporary.write_text("old")
    with (
        _limit(10),
        pytest.raises(WriteError, match=r"x.json cannot be written .*: make space") as error,
        replaced(path) as temporary,
    ):
        temporary.write_bytes(bytes(100))
    assert "\n" not in str(error.value)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_refused_record_leaves_nothing_of_itself(tmp_path):
    file = Appended(tmp_path / "lines")
    file.write(b"first\n")
    # Room for three bytes of the second record: the system takes these and refuses the rest.
    with _limit(9), pytest.raises(WriteError, match="lines cannot be written"):
        file.write(b"second\n")
    assert (tmp_path / "lines").read_bytes() == b"first\n"
    file.write(b"third\n")
    file.close()
    assert (tmp_path / "lines").read_bytes() == b"first\nthird\n"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file/x cannot be written .*: make it writable"):
        Appended(tmp_path / "file" / "x")


def test_the_innermost_name_stays(tmp_path):
    with pytest.raises(WriteError, match="^inner"), naming(tmp_path / "outer"):
        raise WriteError("inner")


def test_an_output_that_cannot_be_a_file_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError, match=f"--output={tmp_path} is a folder: name a file in it"):
        check_file(tmp_path, "--output")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"as {tmp_path / 'file'} is a file"):
        check_file(tmp_path / "file" / "out.json", "--output")
    check_file(tmp_path / "new" / "out.json", "--output")
    check_file(tmp_path / "file", "--output")  # replaced
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
