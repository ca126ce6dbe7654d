"""``moe-jax tokenizer``: a BPE trained on the text of a config."""

import pytest

from moe_jax.cli import common, tokenizer
from moe_jax.data import DataConfig, open_tokenizer
from tests.data.corpora import write_rows


def test_it_trains_on_the_texts_of_dialogues_and_says_how_to_use_it(tmp_path, capsys):
    chat = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say say"}]
    write_rows(tmp_path / "a.jsonl", [{"chat": chat}] * 4)
    flags = {
        "source": f"files:{tmp_path}/a.jsonl",
        "messages_feature": "chat",
        "data_dir": f"{tmp_path}/data",
        "vocab_size": 264,
        "shuffle_window": 1,
    }
    changes = [f"--config.data.{name}={value}" for name, value in flags.items()]
    output = tmp_path / "mine"
    arguments = ["tokenizer", "--config=quickstart", f"--output={output}", *changes]
    common.run(tokenizer.define, tokenizer.main, arguments)
    shown = capsys.readouterr().out
    assert shown.startswith(f"{output}: 264 tokens, ")
    assert f"--config.data.tokenizer=hf:{output}" in shown
    # The names of the roles are not texts.
    made = open_tokenizer(DataConfig(tokenizer=f"hf:{output}"))
    assert len(made.encode("say")) == 1 and len(made.encode("user")) == 4


def test_output_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        common.run(tokenizer.define, tokenizer.main, ["tokenizer", "--config=quickstart"])
    assert "output" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_named_before_training(tmp_path, capsys):
    (tmp_path / "file").touch()
    arguments = ["tokenizer", "--config=quickstart", f"--output={tmp_path}/file"]
    with pytest.raises(SystemExit):
        common.run(tokenizer.define, tokenizer.main, arguments)
    assert f"{tmp_path}/file is a file: use another --output" in capsys.readouterr().err
