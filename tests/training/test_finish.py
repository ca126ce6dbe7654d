"""When a run counts as finished."""

import pytest

from moe_jax.run.finish import has_result


@pytest.fixture
def folder(tmp_path):
    """What a finished run leaves, as far as this is looked at."""
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "expert_tokens.json").write_text('{"layers": []}')
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 1}\n{"kind": "eval", "step": 1}\n'
    )
    (tmp_path / "report.html").write_text("<html></html>\n")
    return tmp_path


def test_a_run_with_all_its_results_is_finished(folder, caplog):
    assert has_result(folder)
    assert caplog.text == ""


def test_a_run_without_a_result_is_not_and_says_nothing(tmp_path, caplog):
    assert not has_result(tmp_path)
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["result.json", "expert_tokens.json"])
def test_a_damaged_result_is_named_and_made_again(folder, caplog, name):
    (folder / name).write_text("{")
    assert not has_result(folder)
    assert f"{name} is damaged" in caplog.text and "evaluated again" in caplog.text


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "missing"),
        ("{\n" + '{"kind": "eval", "step": 1}\n', "damaged"),
        ('{"kind": "train", "step": 1}\n{"kind": "ev', "cut"),
        ("", "cut"),
    ],
)
def test_a_log_that_is_not_whole_is_named_and_the_results_stand(folder, caplog, content, fault):
    (folder / "metrics.jsonl").unlink()
    if content is not None:
        (folder / "metrics.jsonl").write_text(content)
    assert has_result(folder)
    assert f"metrics.jsonl is {fault}" in caplog.text


def test_a_lost_table_of_tokens_is_named_and_made_again(folder, caplog):
    (folder / "expert_tokens.json").unlink()
    assert not has_result(folder)
    assert "expert_tokens.json is missing: the run is evaluated again" in caplog.text


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"\x00" * 9])
def test_bytes_that_are_no_text_are_damage(folder, content):
    (folder / "result.json").write_bytes(content)
    assert not has_result(folder)
