import re

import pytest

from moe_jax.data import DataConfig, check_source, open_source, read_contents
from moe_jax.errors import ConfigError

from .corpora import names, write_corpus


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
    with pytest.raises(ConfigError, match="only file and has 4 characters") as error:
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
