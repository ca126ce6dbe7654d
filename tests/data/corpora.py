"""Small corpora for the tests of the data layer."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from moe_jax.data.python_library import Builder, PythonLibraryConfig
from moe_jax.data.python_library.python_library_dataset_builder import is_validation


def names(count, validation):
    """File names that the hash split sends to one side."""
    candidates = (f"{number:05d}.txt" for number in range(10**5))
    chosen = [name for _, name in zip(range(40 * count + 400), candidates, strict=False)]
    return [name for name in chosen if is_validation(name) == validation][:count]


def write_corpus(directory, train, validation):
    """Writes documents as files of a hash-split corpus; returns the source's name."""
    for texts, is_eval in ((train, False), (validation, True)):
        for name, text in zip(names(len(texts), is_eval), texts, strict=True):
            (directory / name).write_bytes(text.encode("utf-8"))
    return f"files:{directory}/*.txt"


def write_rows(path, rows):
    """Writes one row per document, as JSON lines or Parquet, compressed as the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
        return
    with pa.output_stream(str(path)) as stream:
        stream.write("".join(f"{json.dumps(row)}\n" for row in rows).encode())


def write_library(root):
    """Writes 60 modules and files that the builder must skip; returns name to text."""
    kept = {f"pkg/m{number}.py": f"def x():\n    return {number}\n" for number in range(60)}
    dropped = ["test/a.py", "pkg/tests/b.py", "idlelib/idle_test/c.py", "site-packages/d.py"]
    for name in [*kept, *dropped, "pkg/readme.txt"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(kept.get(name, "no\n"))
    (root / "empty.py").write_bytes(b"")
    (root / "table.py").write_text("TABLE = {0x80: 0xc7, 0x81: 0xfc}\n")
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    return kept


def tiny_builder(root, directory):
    """The real builder on a small library."""
    config = PythonLibraryConfig(name="tiny", root=str(root))
    return Builder(data_dir=str(directory), config=config, file_format="array_record")
