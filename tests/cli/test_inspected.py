"""The page of ``analyze`` and of ``explain`` is checked before the model is read."""

import pytest

from moe_jax.cli import analyze, common, explain

COMMANDS = {
    "analyze": (analyze, "--corpus=files:none/*.txt"),
    "explain": (explain, "--prompt=a"),
}


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
