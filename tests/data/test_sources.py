import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.data import DataConfig, check_source, open_source
from moe_jax.data.prepared import prepare

from .corpora import tiny_builder, write_corpus, write_library


def texts(source):
    return [source[i] for i in range(len(source))]


def assert_one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_are_split_and_read_in_order(tmp_path):
    (tmp_path / "a").mkdir()
    name = write_corpus(tmp_path / "a", ["t0", "t1\r\n", "t2"], ["é"])
    nested = name.replace("/*", "/**/*")
    assert texts(open_source(DataConfig(source=name), "train")) == ["t0", "t1\r\n", "t2"]
    assert texts(open_source(DataConfig(source=name), "eval")) == ["é"]
    assert texts(open_source(DataConfig(source=nested), "train")) == ["t0", "t1\r\n", "t2"]


def test_files_split_survives_a_move(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder / "deep").mkdir(parents=True)
        name = write_corpus(tmp_path / folder / "deep", ["a", "b"], ["c"])
        found = texts(open_source(DataConfig(source=name), "eval"))
        assert found == ["c"]


def test_eval_documents_takes_the_first(corpus):
    config = dataclasses.replace(corpus, eval_documents=2)
    assert texts(open_source(config, "eval")) == ["ab", "cdefg"]
    assert len(open_source(config, "train")) == 40
    assert len(open_source(dataclasses.replace(corpus, eval_documents=99), "eval")) == 3


def test_tfds_split_expressions(library):
    config = dataclasses.replace(library, train_split="train[:10]", eval_split="train[10:12]")
    assert len(open_source(config, "train")) == 10
    whole = open_source(library, "train")
    assert texts(open_source(config, "eval")) == [whole[10], whole[11]]


@pytest.mark.parametrize(
    ("fields", "kind", "parts"),
    [
        ({"source": "lmb1"}, ValueError, ["unknown", "lm1b"]),
        ({"source": "lm1b"}, FileNotFoundError, ["not prepared", "tfds build lm1b", "--data_dir"]),
        ({"source": "c4/en"}, FileNotFoundError, ["not prepared", "tfds build c4/en"]),
        ({"source": "files:/nonexistent/*.txt"}, FileNotFoundError, ["no file matches"]),
        ({"data_dir": __file__}, ValueError, ["data.data_dir", "is a file: set it to a folder"]),
        ({"text_feature": "body"}, ValueError, ["no text feature 'body'", "'text'"]),
        ({"eval_split": "test"}, ValueError, ["no split 'test'", "validation", "eval_split"]),
        ({"train_split": "train[:0]"}, ValueError, ["train_split"]),
    ],
)
def test_errors_say_what_to_change(library, fields, kind, parts):
    with pytest.raises(kind) as error:
        check_source(dataclasses.replace(library, **fields))
    message = assert_one_line(error)
    assert all(part in message for part in parts)


def test_binary_file_is_named(tmp_path):
    source = write_corpus(tmp_path, ["a"], ["b"])
    documents = open_source(DataConfig(source=source), "train")
    next(tmp_path.glob("00000.txt")).write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="00000.txt is not UTF-8"):
        documents[0]


def test_wrong_file_format_says_how_to_convert(tmp_path):
    write_library(tmp_path / "lib")
    builder = tiny_builder(tmp_path / "lib", tmp_path / "data")
    prepare(builder)
    # Only TensorFlow can write this format; what TFDS reads first is the declaration.
    info = Path(builder.data_path) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    config = DataConfig(source="python_library/tiny", data_dir=str(tmp_path / "data"))
    with pytest.raises(ValueError, match="prepared as tfrecord.*tfds convert_format") as error:
        open_source(config, "train")
    assert_one_line(error)


def test_check_does_not_prepare_the_library(tmp_path):
    check_source(DataConfig(data_dir=str(tmp_path / "none")))
    assert not (tmp_path / "none" / "python_library").exists()


def test_bad_split_name():
    with pytest.raises(ValueError, match="split must be"):
        open_source(DataConfig(source="mixture"), "test")


SCRIPT = """
import sys
from moe_jax.data import DataConfig, baselines, open_tokenizer, train_batches
config = DataConfig(data_dir=sys.argv[1], tokenizer="bytes", shuffle_window=8)
batches = train_batches(config, open_tokenizer(config))
assert next(batches)["inputs"].shape == (16, 256)
assert "tensorflow" not in sys.modules
"""


def test_no_tensorflow_and_a_quiet_exit(data_dir):
    command = [sys.executable, "-c", SCRIPT, data_dir]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout == ""


def test_processes_that_prepare_at_once_all_succeed(tmp_path):
    script = (
        "import sys; from moe_jax.data import DataConfig, open_source;"
        "print(len(open_source(DataConfig(data_dir=sys.argv[1]), 'eval')))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    counts = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(counts) == 1 and int(counts.pop()) > 10
