import shutil

import pytest

from moe_jax.data import DataConfig, check_source, prepared, read_contents
from moe_jax.data.prepared import prepare
from moe_jax.errors import ConfigError

from .corpora import tiny_builder, write_library


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    write_library(root / "lib")
    prepare(tiny_builder(root / "lib", root / "data"))
    return root / "data"


@pytest.fixture
def folder(dataset, tmp_path):
    """The folder of a prepared dataset that a test may damage."""
    shutil.copytree(dataset, tmp_path / "data")
    return tmp_path / "data" / "python_library" / "tiny" / "2.0.0"


def config_of(folder):
    return DataConfig(source="python_library/tiny", data_dir=str(folder.parents[2]))


def shard(folder):
    (path,) = folder.glob("*train*")
    return path


def garbled(path):
    """Changes bytes in the middle of what is no padding."""
    content = bytearray(path.read_bytes())
    written = [place for place, byte in enumerate(content) if byte]
    for place in written[len(written) // 2 :][:16]:
        content[place] ^= 0x55
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (shard, lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])),
        (shard, lambda path: path.write_bytes(b"")),
        (shard, lambda path: path.unlink()),
        (shard, garbled),
        (lambda folder: folder / "dataset_info.json", lambda path: path.unlink()),
        (lambda folder: folder / "dataset_info.json", lambda path: path.write_text("{")),
        (lambda folder: folder / "features.json", lambda path: path.write_text("no")),
    ],
    ids=["truncated", "emptied", "removed", "garbled", "no info", "broken info", "features"],
)
def test_a_damaged_dataset_is_named_by_its_file(folder, file, damage):
    path = file(folder)
    config = config_of(folder)
    read_contents(config)
    prepared._check_shard.cache_clear()
    damage(path)
    with pytest.raises(ConfigError) as error:
        check_source(config)
        read_contents(config)
    message = str(error.value)
    assert str(path) in message and "prepare" in message
    assert "\n" not in message


def test_an_older_version_is_read_by_its_name(folder):
    config = DataConfig(source="python_library/tiny:2.0.0", data_dir=str(folder.parents[2]))
    assert read_contents(config) == read_contents(config_of(folder))


def test_a_folder_that_takes_no_dataset_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written .*set data.data_dir"):
        read_contents(DataConfig(data_dir=str(tmp_path / "file" / "folder")))
