"""Documents of one file, and what is refused."""

import pytest

from moe_jax.data.documents import read_documents
from moe_jax.errors import ConfigError


def test_a_text_file_is_one_document_and_a_json_line_another(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert list(read_documents(tmp_path / "a.txt")) == ["one\n\ntwo\n"]
    lines = '{"text": "one\\ntwo", "id": 1}\n\n{"text": ""}'
    (tmp_path / "a.jsonl").write_text(lines)
    assert list(read_documents(tmp_path / "a.jsonl")) == ["one\ntwo", ""]
    (tmp_path / "b.ndjson").write_text('{"body": "ü"}\n')
    assert list(read_documents(tmp_path / "b.ndjson", "body")) == ["ü"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "y", "id": 1}', "line 2 has no text in field 'text'"),
        ("a.jsonl", b'{"text": 3}', "its fields: text"),
        ("a.jsonl", b"[1]", "its fields: none"),
        ("a.jsonl", b"plain", "a.jsonl line 1 is not JSON"),
        ("a.txt", b"\xff\xfe", "a.txt is not UTF-8 text"),
        (None, b"", "nothing.txt is not a file"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, name, content, said):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        list(read_documents(tmp_path / (name or "nothing.txt")))
    assert said in str(error.value) and "\n" not in str(error.value)
