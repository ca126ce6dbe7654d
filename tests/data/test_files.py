import concurrent.futures
import dataclasses
import gzip
import re

import pytest

from moe_jax.data import DataConfig, check_source, empty_files, open_source, read_contents
from moe_jax.data.files import open_all_files
from moe_jax.errors import ConfigError

from .corpora import names, write_corpus, write_rows


def texts(config, split):
    source = open_source(config, split)
    return [source[i] for i in range(len(source))]


def test_of_few_files_one_is_for_validation(tmp_path):
    # The hash alone would leave validation empty.
    source = write_corpus(tmp_path, ["a", "b", "c"], [])
    config = DataConfig(source=source)
    check_source(config)
    (held,) = texts(config, "eval")
    assert sorted([held, *texts(config, "train")]) == ["a", "b", "c"]


def test_files_that_the_hash_all_gives_to_validation_are_for_training_too(tmp_path):
    config = DataConfig(source=write_corpus(tmp_path, [], ["a", "b", "c"]))
    assert len(texts(config, "eval")) == 1
    assert len(texts(config, "train")) == 2


def test_of_one_file_every_twentieth_part_is_for_validation(tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(1000))
    config = DataConfig(source=write_corpus(tmp_path, [text], []))
    held, kept = texts(config, "eval"), texts(config, "train")
    # Hundredths 10, 30, 50, 70 and 90 of 1,000 characters, and what lies between.
    assert held == [text[start : start + 10] for start in (100, 300, 500, 700, 900)]
    assert [len(part) for part in kept] == [100, 190, 190, 190, 190, 90]
    assert kept[0] + held[0] + kept[1] == text[:300]
    assert open_source(config, "train").identity != open_source(config, "eval").identity


def test_one_file_that_is_too_short_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="00000.txt is the only document and has 4 char") as error:
        check_source(DataConfig(source=write_corpus(tmp_path, ["only"], [])))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"), [(b"caf\xe9", "not UTF-8 text (byte 3)"), (b"ab\0cd", "binary")]
)
def test_files_that_are_no_text_are_counted_and_named(tmp_path, content, said):
    source = write_corpus(tmp_path, ["a", "b", "c"], ["d"])
    for name in names(3, False)[1:]:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        check_source(DataConfig(source=source))
    message = str(error.value)
    assert message.startswith("2 of 4 files") and names(3, False)[1] in message
    assert "\n" not in message


def test_empty_files_are_no_documents(tmp_path):
    source = write_corpus(tmp_path, ["a", "", "c"], ["d", ""])
    contents = read_contents(DataConfig(source=source))
    assert (contents.training, contents.validation) == (2, 1)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"all 5 file\(s\) .* are empty"):
        check_source(DataConfig(source=source))


def test_the_hash_of_a_corpus_is_of_its_text_alone(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first = write_corpus(tmp_path / "one", ["ab", "c"], ["d"])
    moved = write_corpus(tmp_path / "two", ["ab", "c"], ["d"])
    digest = read_contents(DataConfig(source=first)).sha256
    assert read_contents(DataConfig(source=moved)).sha256 == digest
    # Where one document ends and the next begins counts.
    write_corpus(tmp_path / "two", ["a", "bc"], ["d"])
    assert read_contents(DataConfig(source=moved)).sha256 != digest


def config_of(tmp_path, pattern, **more):
    return DataConfig(source=f"files:{tmp_path}/{pattern}", data_dir=str(tmp_path / "data"), **more)


@pytest.mark.parametrize(
    "ending", [".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".parquet"]
)
def test_each_row_is_a_document(tmp_path, ending):
    documents = [f"text {i}\r\n é" for i in range(40)]
    write_rows(tmp_path / f"a{ending}", [{"body": text, "url": "u"} for text in documents])
    config = config_of(tmp_path, f"*{ending}", text_feature="body")
    check_source(config)
    # One in 20 of 40, at equal distances: documents 10 and 30.
    assert texts(config, "eval") == [documents[10], documents[30]]
    assert texts(config, "train") == documents[:10] + documents[11:30] + documents[31:]
    size = open_source(config, "train").size
    assert size == sum(len(text.encode()) for text in documents) * 38 // 40


def test_a_second_start_reads_the_kept_documents(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    config = config_of(tmp_path, "*.jsonl")
    texts(config, "train")
    (kept,) = (tmp_path / "data/records").glob("*.array_record")
    before = kept.stat().st_mtime_ns
    texts(config, "train")
    assert kept.stat().st_mtime_ns == before
    write_rows(tmp_path / "a.jsonl", [{"text": "other"}, {"text": "b"}])
    assert "other" in texts(config, "train") + texts(config, "eval")


def test_several_readers_may_write_the_kept_documents_at_once(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": f"{i}" * 50} for i in range(500)])
    config = config_of(tmp_path, "*.jsonl")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: texts(config, "train"), range(4)))
    assert len(found[0]) == 475 and all(one == found[0] for one in found)
    assert len(list((tmp_path / "data/records").iterdir())) == 2  # no remains


def test_a_damaged_file_of_kept_documents_is_named(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    config = config_of(tmp_path, "*.jsonl")
    texts(config, "train")
    (kept,) = (tmp_path / "data/records").glob("*.array_record")
    kept.write_bytes(b"")
    with pytest.raises(ConfigError, match=f"{kept} is damaged .*delete it"):
        texts(config, "train")


def test_a_damaged_record_names_its_file(tmp_path):
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name * 3000}] * 3)
    config = config_of(tmp_path, "*.jsonl")
    source = open_all_files(config)
    kept = [file.path for file in source.files]
    content = bytearray(kept[1].read_bytes())
    # The first chunk follows the header of 64 bytes.
    content[100:140] = bytes(255 ^ byte for byte in content[100:140])
    kept[1].write_bytes(content)
    assert source[0] == "a" * 3000
    with pytest.raises(ConfigError, match=f"{kept[1]} is damaged .*delete it"):
        [source[i] for i in range(6)]


def test_texts_and_rows_form_one_corpus(tmp_path):
    (tmp_path / "a.md").write_text("whole file")
    write_rows(tmp_path / "b.jsonl", [{"text": "row"}, {"text": ""}])
    config = config_of(tmp_path, "*.*")
    # An empty document is left out.
    assert sorted(texts(config, "train") + texts(config, "eval")) == ["row", "whole file"]


def test_the_share_of_validation_is_a_setting(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(12)])
    held = texts(config_of(tmp_path, "*.jsonl", eval_one_in=4), "eval")
    assert held == ["2", "6", "10"]
    write_corpus(tmp_path, [str(i) for i in range(300)], [])
    assert 100 < len(texts(config_of(tmp_path, "*.txt", eval_one_in=2), "eval")) < 200


def test_validation_has_a_pattern_of_its_own(tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"text": "a"}, {"text": "b"}])
    write_rows(tmp_path / "held.jsonl.gz", [{"text": "c"}])
    config = config_of(tmp_path, "train.*", eval_source=f"files:{tmp_path}/held*")
    check_source(config)
    assert texts(config, "train") == ["a", "b"]
    assert texts(config, "eval") == ["c"]
    contents = read_contents(config)
    assert (contents.training, contents.validation, contents.counted) == (2, 1, "documents")
    missing = dataclasses.replace(config, eval_source=f"files:{tmp_path}/none*")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        check_source(missing)


def test_spans_are_what_is_counted_of_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 500)
    contents = read_contents(config_of(tmp_path, "a.txt"))
    said = "95 spans of one document for training, 5 for validation, SHA-256 "
    assert contents.summary == said + contents.sha256[:12]
    write_rows(tmp_path / "a.parquet", [{"text": "x" * 500}])
    contents = read_contents(config_of(tmp_path, "*.parquet", eval_one_in=50))
    assert (contents.training, contents.validation) == (98, 2)
    # A smaller share needs more spans.
    contents = read_contents(config_of(tmp_path, "*.parquet", eval_one_in=200))
    assert (contents.training, contents.validation) == (199, 1)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', "line 2 is not UTF-8 text (byte 13)"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2 is not JSON"),
        ("a.jsonl", b"[1]", "line 1 is not a JSON object"),
        ("a.jsonl", b'{"body": "a"}', "has no field 'text'; it has body (set data.text_feature)"),
        ("a.jsonl", b'{"text": 3}', "row 1: the field 'text' holds int and not text"),
        ("a.jsonl", b'{"text": "a\\u0000"}', "holds binary data"),
        ("a.jsonl", b'{"text": "\\ud800"}', "is not Unicode text"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz cannot be read"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-20],
            "cannot be read (Truncated",
        ),
        ("a.parquet", b"PAR1", "a.parquet cannot be read"),
        ("a.jsonl", b"\n\n", "hold no document"),
    ],
)
def test_rows_that_are_no_text_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    config = config_of(tmp_path, name)
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        texts(config, "train")
    assert "\n" not in str(error.value) and name in str(error.value)


def test_the_check_reads_the_first_row_and_writes_nothing(tmp_path):
    write_rows(tmp_path / "a.parquet", [{"body": "a"}])
    with pytest.raises(ConfigError, match="1 of 1 files .*no field 'text'; it has body"):
        check_source(config_of(tmp_path, "*.parquet"))
    check_source(config_of(tmp_path, "*.parquet", text_feature="body"))
    assert not (tmp_path / "data").exists()


def test_empty_files_are_named(tmp_path):
    config = DataConfig(source=write_corpus(tmp_path, ["a", ""], ["b"]))
    assert [path[-9:] for path in empty_files(config)] == ["00001.txt"]
    assert empty_files(DataConfig(source="mixture")) == []


def test_the_first_training_documents(tmp_path):
    config = DataConfig(source=write_corpus(tmp_path, ["a", "b", "c"], ["d"]), train_documents=2)
    assert texts(config, "train") == ["a", "b"] and texts(config, "eval") == ["d"]
