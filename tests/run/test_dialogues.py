"""A run on instruction data, whose targets are the answers."""

import math

import moe_jax as mj
from moe_jax.cli import common, generate
from moe_jax.data import chat_prompt
from tests.data.corpora import write_rows
from tests.system import tiny


def test_a_run_learns_answers_and_nothing_else(tmp_path, capsys):
    # Prompts are noise, and every answer is the same.
    messages = [
        [{"role": "user", "content": f"{i * 7919 % 997}"}, {"role": "assistant", "content": "aaaa"}]
        for i in range(40)
    ]
    write_rows(tmp_path / "chats.jsonl", [{"messages": one} for one in messages])
    changes = {
        "data.source": f"files:{tmp_path}/chats.jsonl",
        "data.messages_feature": "messages",
        "data.data_dir": str(tmp_path / "data"),
        "data.seq_length": 64,
        "optimizer.learning_rate": 0.02,
        "training.steps": 60,
        "training.eval_every": 0,
        "training.log_every": 60,
    }
    run = mj.train(tiny.get_config(), tmp_path / "run", changes)
    # A uniform model of 259 bytes has 5.6 nats; noise of three digits alone would cost 2.3 each.
    assert run.result["loss"] < 0.5 < math.log(259)
    assert run.result["baselines"] == {}
    prompt = chat_prompt(run.session.tokenizer, [{"role": "user", "content": "12"}])
    assert run.generate(prompt, temperature=0.0, tokens=9) == f"{prompt}aaaa"
    flags = [f"--workdir={run.workdir}", "--chat", "--prompt=12", "--temperature=0", "--tokens=9"]
    common.run(generate.define, generate.main, ["generate", *flags])
    assert capsys.readouterr().out == f"{prompt}aaaa\n"
