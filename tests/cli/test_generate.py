"""``moe-jax generate`` on a folder of transformers: whole, in parts, and in turns."""

import io

import jax
import pytest
from absl import flags

from moe_jax import models
from moe_jax.cli import generate
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import FAMILIES, save
from moe_jax.serving import engines
from tests.data.test_hf_tokenizer import byte_level
from tests.serving.process import engine_of
from tests.test_face import TINY_MIXTRAL

REAL = engines.engine_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "tiny"
    original = {**TINY_MIXTRAL, "vocab_size": 280}
    model = models.make(FAMILIES["mixtral"].read(original), 280, jax.random.key(0))
    save(model, path, "mixtral", original=original)
    byte_level(path, chat_template="{% for m in messages %}<{{ m.content }}>{% endfor %}")
    return path


@pytest.fixture
def said(folder, capsys, monkeypatch):
    """A function from flags to what the command prints."""
    monkeypatch.setattr(engines, "engine_of", engine_of)

    def run(*arguments):
        values = flags.FlagValues()
        generate.define(values)
        common = (f"--model={folder}", "--tokens=4", "--temperature=0")
        values(["generate", *common, *arguments])
        generate.main(values)
        return capsys.readouterr().out

    return run


def test_a_stream_prints_what_is_printed_whole(said):
    whole = said("--prompt=def")
    assert whole.startswith("def") and said("--prompt=def", "--stream") == whole


@pytest.mark.parametrize("draft", ["ngram", "a model"])
def test_drafts_change_no_text(said, folder, monkeypatch, draft):
    whole = said("--prompt=defdef", "--tokens=8")
    rooms = []
    monkeypatch.setattr(engines, "engine_of", lambda opened, room: keep(rooms, opened, room))
    draft = str(folder) if draft == "a model" else draft
    assert said("--prompt=defdef", "--tokens=8", "--stream", f"--draft={draft}") == whole
    assert rooms[0].speculation.tokens == 4
    with pytest.raises(ConfigError, match="--draft=ngram needs --stream or --turns"):
        said("--draft=ngram")


@pytest.mark.parametrize("more", [(), ("--expert_policy=lru", "--expert_prefetch=none")])
def test_a_budget_for_experts_changes_no_text(said, monkeypatch, more):
    whole = said("--prompt=defdef", "--tokens=8", "--stream")
    rooms = []
    monkeypatch.setattr(engines, "engine_of", lambda opened, room: keep(rooms, opened, room))
    budget = "--expert_bytes=64kB"
    assert said("--prompt=defdef", "--tokens=8", "--stream", budget, *more) == whole
    assert rooms[0].offload.bytes == 64000


def test_a_budget_for_experts_needs_a_stream_and_a_size(said):
    with pytest.raises(ConfigError, match="--expert_bytes=2GB needs --stream or --turns"):
        said("--expert_bytes=2GB")
    with pytest.raises(ConfigError, match="--expert_bytes=much is no size: write 2GB"):
        said("--stream", "--expert_bytes=much")


def test_a_draft_that_is_no_folder_is_named_before_the_model_is_read(said, monkeypatch):
    monkeypatch.setattr(generate, "open_folder", None)  # A call would fail.
    with pytest.raises(ConfigError, match="--draft=lookahed holds no run, no converted model"):
        said("--stream", "--draft=lookahed")


def test_a_number_of_drafts_needs_a_way_to_draft(said):
    with pytest.raises(ConfigError, match="--draft_tokens needs --draft, such as --draft=ngram"):
        said("--stream", "--draft_tokens=2")


def test_a_model_without_lookahead_modules_is_refused_before_it_is_read(said):
    with pytest.raises(ConfigError, match="no lookahead module to draft with"):
        said("--stream", "--draft=lookahead")


def keep(rooms, opened, room):
    rooms.append(room)
    return REAL(opened, room)


def test_a_chat_answers_the_prompt_and_each_line(said, monkeypatch):
    first = said("--prompt=a", "--chat")
    assert first.startswith("<a>")
    monkeypatch.setattr("sys.stdin", io.StringIO("b\n"))
    both = said("--prompt=a", "--turns")
    assert both.startswith(first.removeprefix("<a>")) and len(both) > len(first)


def test_flags_that_exclude_each_other_are_one_line(said):
    with pytest.raises(ConfigError, match="--model and --workdir name two folders"):
        said("--workdir=x")
    with pytest.raises(ConfigError, match="--samples=2 is for whole texts: leave --stream out"):
        said("--stream", "--samples=2")
