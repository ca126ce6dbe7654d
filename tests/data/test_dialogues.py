"""Instruction data: what is a target, and what is an input alone."""

import dataclasses
import itertools
import json
from collections import Counter

import numpy as np
import pytest

from moe_jax.data import (
    BlendConfig,
    Bytes,
    DataConfig,
    PartConfig,
    chat_prompt,
    check_dialogues,
    check_source,
    eval_batches,
    open_source,
    open_tokenizer,
    train_batches,
)
from moe_jax.data.dialogues import Dialogues, PlainTexts
from moe_jax.errors import ConfigError

from .corpora import write_corpus, write_rows

EOS = 2
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "answer"},
    {"role": "user", "content": "r"},
    {"role": "assistant", "content": "other"},
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content + eos_token }}"
    "{% elif message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %}{{ raise_exception('no system prompt') }}{% endif %}{% endfor %}"
)


def config_of(tmp_path, rows, ending=".jsonl", **fields):
    write_rows(tmp_path / f"rows{ending}", rows)
    return DataConfig(
        source=f"files:{tmp_path}/rows{ending}",
        data_dir=str(tmp_path / "data"),
        tokenizer="bytes",
        shuffle_window=1,
        seq_length=64,
        batch_size=1,
        **fields,
    )


def batch_of(config, tokenizer):
    batches = eval_batches(config, tokenizer)
    found = list(batches)
    batches.close()
    return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}


def learnt(batch, tokenizer):
    """The targets that count, as texts, cut at the end token."""
    counted = (batch["predicted"] > 0) & (batch["segments"] > 0)
    ids = batch["targets"][counted].tolist()
    parts = [list(run) for is_end, run in itertools.groupby(ids, EOS.__eq__) if not is_end]
    assert ids.count(EOS) == len(parts)
    return [tokenizer.decode(np.array(part)) for part in parts]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_only_the_answer_to_a_prompt_is_learnt(tmp_path, ending):
    rows = [{"q": "1+1=", "text": "2"}, {"q": "long prompt ", "text": "yes"}]
    config = config_of(tmp_path, rows, ending, prompt_feature="q")
    check_source(config)
    batch = batch_of(config, Bytes())  # The second of two documents is for validation.
    # "long prompt " has 12 tokens; the answer and the end token follow.
    assert batch["predicted"][0].tolist() == [0] * 12 + [1] * 4 + [0] * 48
    assert Bytes().decode(batch["targets"][0, :15]) == "long prompt yes"
    assert batch["targets"][0, 15] == EOS
    assert batch["inputs"][0, 0] == Bytes.bos_id and (batch["inputs"][0, 1:] != 1).all()
    assert learnt(batch, Bytes()) == ["yes"]


def test_a_dialogue_without_a_template(tmp_path):
    config = config_of(tmp_path, [{"chat": CHAT}] * 2, messages_feature="chat")
    config = dataclasses.replace(config, seq_length=128)
    batch = batch_of(config, Bytes())
    assert learnt(batch, Bytes()) == ["answer", "other"]
    text = "<|system|>\nS\n<|user|>\nq\n<|assistant|>\nanswer\n<|user|>\nr\n<|assistant|>\nother"
    assert Bytes().decode(batch["targets"][0]) == text
    prompt = chat_prompt(Bytes(), CHAT[:4])
    # What a model is asked is what it has learnt from, apart from the end token after an answer.
    assert text == prompt + "other"


@pytest.mark.parametrize("place", ["config", "file", "list"])
def test_a_dialogue_in_the_template_of_a_release(tmp_path, place):
    tokenizer = open_tokenizer(config_with_template(tmp_path, place))
    config = config_of(tmp_path, [{"chat": CHAT[1:]}] * 2, messages_feature="chat")
    batch = batch_of(config, tokenizer)
    assert learnt(batch, tokenizer) == ["answer", "other"]
    real = batch["segments"][0] > 0
    targets = batch["targets"][0][real]
    # The template begins with the begin token and ends with the end token; neither is doubled.
    assert Counter(targets.tolist())[EOS] == 2 and tokenizer.bos_id not in targets
    assert (batch["inputs"][0][real] == tokenizer.bos_id).sum() == 1
    assert tokenizer.decode(targets) == "[INST] q [/INST]answer[INST] r [/INST]other"
    assert chat_prompt(tokenizer, CHAT[1:2]) == "[INST] q [/INST]"


def config_with_template(tmp_path, place):
    byte_level = pytest.importorskip("tests.data.test_hf_tokenizer").byte_level
    named = {}
    if place == "config":
        named = {"chat_template": TEMPLATE}
    if place == "list":
        template = [{"name": "x", "template": ""}, {"name": "default", "template": TEMPLATE}]
        named = {"chat_template": template}
    setting = byte_level(tmp_path / "hf", **named)
    if place == "file":
        (tmp_path / "hf" / "chat_template.jinja").write_text(TEMPLATE)
    return DataConfig(tokenizer=setting)


def test_a_token_belongs_to_the_piece_where_it_ends(tmp_path):
    tokenizer = open_tokenizer(config_with_template(tmp_path, "none"))
    # A token of the space before a word and of letters.
    pieces = [tokenizer.decode(np.array([i])) for i in range(tokenizer.vocab_size)]
    piece = next(piece for piece in pieces if piece[:1] == " " and piece.strip())
    merged = tokenizer.encode(f"x{piece}")
    assert tokenizer.decode(merged[-1:]) == piece
    document = json.dumps([["user", "x "], ["assistant", piece[1:]]])
    ids, answers = Dialogues(tokenizer, plain=True).encode(document)
    np.testing.assert_array_equal(ids, merged)
    assert answers.tolist() == [False] * (len(merged) - 1) + [True]


def test_a_template_that_rejects_a_dialogue_is_found_at_the_start(tmp_path):
    tokenizer = open_tokenizer(config_with_template(tmp_path, "file"))
    rows = [{"chat": CHAT[1:]}, {"chat": CHAT[1:]}, {"chat": CHAT}]
    config = config_of(tmp_path, rows, messages_feature="chat")
    with pytest.raises(ConfigError, match="train dialogue 1: .*no system prompt") as error:
        check_dialogues(config, tokenizer)
    assert "\n" not in str(error.value)
    check_dialogues(config, Bytes())


def test_a_template_that_rewrites_the_past_is_refused(tmp_path):
    config = config_with_template(tmp_path, "none")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages | length }}")
    dialogues = Dialogues(open_tokenizer(config), plain=False)
    with pytest.raises(ConfigError, match="changes earlier messages"):
        dialogues.encode(json.dumps([["user", "a"], ["assistant", "b"]]))


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ("text", "holds no list of messages"),
        ([{"role": "user"}], "has no field 'content'"),
        ([{"role": "user", "content": "q"}], "no message with the role assistant"),
        ([{"role": "assistant", "content": 3}], "'content' holds int and not text"),
    ],
)
def test_malformed_dialogues_are_named(tmp_path, chat, said):
    config = config_of(tmp_path, [{"chat": chat}], messages_feature="chat")
    with pytest.raises(ConfigError, match=said) as error:
        check_source(config)
    assert "row 1" in str(error.value) and "\n" not in str(error.value)


def test_a_blend_of_texts_and_answers_learns_all_of_the_texts(tmp_path):
    config = config_of(tmp_path, [{"q": "ask ", "a": "say"}] * 4)
    texts = write_corpus(tmp_path, ["plain"] * 3, ["plain"])
    asked = PartConfig(config.source, "asked", 1.0, "a", "q")
    blend = BlendConfig((asked, PartConfig(texts, "texts", 1.0)))
    config = dataclasses.replace(config, source="blend", blend=blend, batch_size=2, seq_length=8)
    assert learnt(batch_of(config, Bytes()), Bytes()) == ["say", "plain"]
    batches = train_batches(config, Bytes())
    batch = next(batches)
    batches.close()
    of_texts = batch["domains"] == 1
    assert (batch["predicted"][of_texts] == 1).all()
    assert 0 < batch["predicted"][~of_texts].sum() < (~of_texts).sum()


def test_a_tokenizer_is_trained_on_the_texts_alone(tmp_path):
    config = config_of(tmp_path, [{"chat": CHAT}] * 2, messages_feature="chat")
    assert PlainTexts(open_source(config, "train"))[0] == "S\nq\nanswer\nr\nother"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt_feature": "a", "messages_feature": "b"}, "both set"),
        ({"prompt_feature": "a", "mask_rate": 0.5}, "unset data.spans and data.mask_rate"),
        ({"prompt_feature": "a", "shuffle_window": 0}, "keeps no marks of answers"),
        ({"prompt_feature": "a", "source": "mixture"}, "'mixture' has no field 'a'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, said):
    with pytest.raises(ValueError, match=said) as error:
        DataConfig(**{"source": "files:x", **fields})
    assert "\n" not in str(error.value)


def test_text_files_and_single_dialogues_are_refused(tmp_path):
    config = config_of(tmp_path, [{"q": "a", "text": "b"}], prompt_feature="q")
    with pytest.raises(ConfigError, match="only one dialogue"):
        open_source(config, "train")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match="a.txt has no fields for prompts"):
        check_source(dataclasses.replace(config, source=f"files:{tmp_path}/*.txt"))
