import sys
import sysconfig
from pathlib import Path

import pytest

from moe_jax.data import DataConfig, open_source
from moe_jax.data.prepared import prepare
from moe_jax.data.python_library.python_library_dataset_builder import (
    interpreter_config,
    is_table,
    is_validation,
    source_paths,
)

from .corpora import tiny_builder, write_library


def read(builder, split):
    records = builder.as_data_source(split)
    return {records[i]["path"].decode(): records[i]["text"].decode() for i in range(len(records))}


def test_tiny_library_keeps_modules_and_splits_by_path(tmp_path):
    kept = write_library(tmp_path / "lib")
    builder = tiny_builder(tmp_path / "lib", tmp_path / "data")
    prepare(builder)
    train, validation = read(builder, "train"), read(builder, "validation")
    assert {**train, **validation} == kept
    assert not train.keys() & validation.keys()
    assert set(validation) == {name for name in kept if is_validation(name)}
    # The generic path, which knows nothing of this builder, opens the same files.
    config = DataConfig(source="python_library/tiny", data_dir=str(tmp_path / "data"))
    source = open_source(config, "eval")
    assert {source[i] for i in range(len(source))} == set(validation.values())


def test_a_table_is_a_module_that_mostly_lists_constants():
    # The docstring and the function have 55 characters, the list 14: no table. Nine lists: a table.
    code = '"""Names and a rule."""\ndef of(name):\n    return 2*name\n'
    row = "TABLE = [1,2]\n"
    assert not is_table(code + row)
    assert is_table(code + 9 * row)
    # What calls with constants is data too; what decides or only has a docstring is not.
    assert is_table("codes.update({0x80: 0xc7, 0x81: 0xfc})\n")
    assert not is_table("rule = lambda name: 2 * name\n")
    assert not is_table('"""' + "words " * 99 + '"""\n')
    assert not is_table("this is no Python: 1 2 3\n")


def test_the_library_has_no_table_of_codes():
    root = Path(sysconfig.get_paths()["stdlib"])
    tables = ["encodings/cp437.py", "encodings/iso8859_5.py", "html/entities.py", "stringprep.py"]
    assert all(is_table((root / name).read_text("utf-8")) for name in tables)
    modules = ["argparse.py", "heapq.py", "json/decoder.py", "encodings/utf_8.py"]
    assert not any(is_table((root / name).read_text("utf-8")) for name in modules)


def test_interrupted_preparation_leaves_nothing_behind(tmp_path, monkeypatch):
    write_library(tmp_path / "lib")
    builder = tiny_builder(tmp_path / "lib", tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(builder)
    assert not builder.data_path.exists()
    builder = tiny_builder(tmp_path / "lib", tmp_path / "data")
    prepare(builder)
    assert len(builder.as_data_source("train")) > 50


def test_real_library(library):
    train, validation = open_source(library, "train"), open_source(library, "eval")
    sizes = [sum(len(s[i].encode()) for i in range(len(s))) for s in (train, validation)]
    assert sum(sizes) > 5_000_000
    assert 0.02 < sizes[1] / sum(sizes) < 0.12
    root = Path(sysconfig.get_paths()["stdlib"])
    assert len(train) + len(validation) <= len(source_paths(root))
    assert str(sys.version_info[2]) in interpreter_config().name
    assert f"{interpreter_config().name}/2.0.0" in train.identity
