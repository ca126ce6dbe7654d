"""The page of ``analyze`` and of ``explain`` is checked before the model is read."""

import pytest

from moe_jax.cli import analyze, common, explain, inspected

COMMANDS = {
    "analyze": (analyze, "--corpus=files:none/*.txt"),
    "explain": (explain, "--prompt=a"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_of_the_model_is_not_replaced(name, tmp_path, capsys):
    module, flag = COMMANDS[name]
    (tmp_path / "config.json").write_text("{}")
    arguments = [name, f"--model={tmp_path}", flag, f"--output={tmp_path}/config.html"]
    with pytest.raises(SystemExit):
        common.run(module.define, module.main, arguments)
    assert f"would replace {tmp_path}/config.json, a file of the model" in capsys.readouterr().err
    # An earlier page may be replaced: both of its files are there.
    for ending in ("html", "json"):
        (tmp_path / f"page.{ending}").write_text("")
    inspected.check_output(f"{tmp_path}/page.html", str(tmp_path))


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("", "is a folder: name a file in it"),
        ("/page.json", "is the file of the numbers: name the page .html"),
        ("/taken.html", "taken.json is a folder: name a file in it"),
    ],
)
def test_an_output_that_cannot_be_a_page_is_one_line(name, output, reason, tmp_path, capsys):
    module, flag = COMMANDS[name]
    (tmp_path / "taken.json").mkdir()
    # There is no model: the output is the first of the mistakes.
    arguments = [name, f"--model={tmp_path}/none", flag, f"--output={tmp_path}{output}"]
    with pytest.raises(SystemExit) as error:
        common.run(module.define, module.main, arguments)
    message = capsys.readouterr().err
    assert error.value.code == 2 and reason in message and message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken.json"]
    assert not tmp_path.with_suffix(".json").exists()
