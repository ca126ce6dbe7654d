"""Released tokenizers, and ids that a model has beyond those of its tokenizer."""

import json

import numpy as np
import pytest

from moe_jax import data
from moe_jax.data.hf_tokenizer import HFTokenizer
from moe_jax.errors import ConfigError

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

TEXT = "def f(x):\n    return 'é 😀'  # twice\n"


def byte_level(folder, extra=(), **named):
    """A byte-level tokenizer as GPT-2's: 256 bytes and some merges, then special tokens."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT] * 3, trainer)
    inner.add_special_tokens(list(extra))
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"} | named
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return f"hf:{folder}"


def opened(setting, **more):
    return data.open_tokenizer(data.DataConfig(tokenizer=setting, **more))


def test_texts_come_back_and_every_byte_is_counted(tmp_path):
    tokenizer = opened(byte_level(tmp_path / "hf"))
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32 and ids.max() < tokenizer.vocab_size == 280
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.byte_lengths[ids].sum() == len(TEXT.encode())
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.byte_lengths[:3].tolist() == [0, 0, 0]
    assert tokenizer.decode(np.array([1, *ids, 2])) == TEXT
    assert tokenizer.piece(2) == "</s>"


def test_pieces_of_sentencepiece_stand_for_their_bytes(tmp_path):
    # As Llama 2 and Mixtral have them: U+2581 for a space, and bytes where no piece fits.
    pieces = ["<unk>", "<s>", "</s>", "<0xE2>", "\u2581", "a", "\u2581a", "é"]
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, [("\u2581", "a")])
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2, 5]}')
    tokenizer = opened(f"hf:{tmp_path}")
    assert tokenizer.byte_lengths.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        # The list of the generation settings, after the end token of the tokenizer.
        ({"eos_token_id": [9, 2, 5]}, {"eos_token_id": 7}, (2, 9, 5)),
        ({"eos_token_id": 9}, {}, (2, 9)),
        # Generation settings that name none leave the choice to the configuration.
        ({"temperature": 0.6}, {"eos_token_id": [7, 8]}, (2, 7, 8)),
        (None, {"text_config": {"eos_token_id": [4]}}, (2, 4)),
        (None, None, (2,)),
    ],
)
def test_a_generated_text_ends_at_any_end_token_of_the_release(tmp_path, generation, config, ends):
    setting = byte_level(tmp_path / "hf")
    for name, content in (("generation_config", generation), ("config", config)):
        if content is not None:
            (tmp_path / "hf" / f"{name}.json").write_text(json.dumps(content))
    tokenizer = opened(setting)
    assert data.end_ids(tokenizer) == ends and tokenizer.eos_id == 2
    assert data.end_ids(data.with_spare_ids(tokenizer, 300)) == ends
    tokenizer.save(tmp_path / "run")
    assert data.end_ids(data.load_tokenizer(tmp_path / "run")) == ends


def test_a_run_of_before_several_ends_has_one(tmp_path):
    opened(byte_level(tmp_path / "hf")).save(tmp_path)
    content = json.loads((tmp_path / "hf_tokenizer.json").read_text())
    del content["more_ends"]
    (tmp_path / "hf_tokenizer.json").write_text(json.dumps(content))
    assert data.end_ids(data.load_tokenizer(tmp_path)) == (2,) == data.end_ids(data.Bytes())


@pytest.mark.parametrize("named", ["</s>", [2, "</s>"], [[2]], -1, True])
def test_an_end_token_that_is_no_id_is_refused(tmp_path, named):
    setting = byte_level(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    with pytest.raises(ConfigError, match="generation_config.json: eos_token_id=.* token id or a"):
        opened(setting)


def test_without_a_token_that_begins_the_end_token_does(tmp_path):
    assert opened(byte_level(tmp_path / "hf", bos_token=None)).bos_id == 2


def test_it_is_kept_in_the_folder_of_a_run(tmp_path):
    tokenizer = opened(byte_level(tmp_path / "hf"))
    tokenizer.save(tmp_path / "run")
    loaded = data.load_tokenizer(tmp_path / "run")
    assert isinstance(loaded, HFTokenizer) and data.same_tokenizer(loaded, tokenizer)
    np.testing.assert_array_equal(loaded.encode(TEXT), tokenizer.encode(TEXT))
    (tmp_path / "run" / "hf_tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="hf_tokenizer.json is damaged"):
        data.load_tokenizer(tmp_path / "run")


def test_sentinels_of_t5_are_those_of_the_release(tmp_path):
    # The release has <extra_id_0> as its highest id; the model has two rows more than that.
    extra = [f"<extra_id_{i}>" for i in (3, 2, 1, 0)]
    setting = byte_level(tmp_path / "hf", extra)
    spans = data.Spans(sentinels=4)
    base = opened(setting, spans=spans, seq_length=32, target_length=32)
    assert base.vocab_size == 284
    tokenizer = data.with_spare_ids(base, 286)
    assert tokenizer.encode_blanks("<extra_id_0>").tolist() == [283]
    tokenizer.save(tmp_path / "run")
    loaded = data.load_tokenizer(tmp_path / "run")
    assert loaded.vocab_size == 286
    assert loaded.encode_blanks("a<extra_id_3>").tolist()[-1] == 280


@pytest.mark.parametrize("base", [data.Bytes(), None])
def test_spare_ids_stand_for_no_text(tmp_path, base):
    base = base or opened(byte_level(tmp_path / "hf"))
    assert data.with_spare_ids(base, base.vocab_size) is base
    tokenizer = data.with_spare_ids(base, base.vocab_size + 5)
    tokenizer.save(tmp_path / "run")
    loaded = data.load_tokenizer(tmp_path / "run")
    assert loaded.vocab_size == base.vocab_size + 5 == len(loaded.byte_lengths)
    assert loaded.byte_lengths[-5:].tolist() == [0] * 5
    ids = loaded.encode(TEXT)
    assert loaded.decode(np.append(ids, loaded.vocab_size - 1)) == TEXT
    assert data.same_tokenizer(loaded, base)


def test_another_tokenizer_is_named(tmp_path):
    setting = byte_level(tmp_path / "hf")
    theirs = data.DataConfig(tokenizer=setting)
    tokenizer = data.open_tokenizer(theirs)
    assert data.contradiction(theirs, theirs, tokenizer) == ""
    for other in ("bytes", "sentencepiece"):
        found = data.contradiction(data.DataConfig(tokenizer=other), theirs, tokenizer)
        assert f"set it to {setting!r}" in found
        trained = data.DataConfig(tokenizer="bytes")
    assert "set it to 'bytes'" in data.contradiction(theirs, trained, data.Bytes())
    another = data.DataConfig(tokenizer=byte_level(tmp_path / "more", ["<tool>"]))
    assert "is another" in data.contradiction(another, theirs, tokenizer)


def test_folders_without_one_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="holds no tokenizer.json; give the folder"):
        data.check_tokenizer(data.DataConfig(tokenizer=f"hf:{tmp_path}"))
    (tmp_path / "spiece.model").touch()
    with pytest.raises(ConfigError, match="spiece.model alone cannot be read: write tokenizer"):
        data.check_tokenizer(data.DataConfig(tokenizer=f"hf:{tmp_path}"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="tokenizer.json cannot be read"):
        opened(f"hf:{tmp_path}")
    with pytest.raises(ConfigError, match="names no end token: set eos_token"):
        opened(byte_level(tmp_path / "hf", eos_token=None))


def test_a_machine_without_the_package_is_told(tmp_path, monkeypatch):
    setting = byte_level(tmp_path / "hf")

    def missing(name, *args):
        raise ImportError(name)

    monkeypatch.setattr("moe_jax.data.hf_tokenizer.importlib.import_module", missing)
    with pytest.raises(ConfigError, match="needs the package tokenizers: pip install tokenizers"):
        data.check_tokenizer(data.DataConfig(tokenizer=setting))
