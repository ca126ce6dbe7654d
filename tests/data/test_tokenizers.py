import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import (
    Bytes,
    DataConfig,
    MixtureConfig,
    SentencePiece,
    WithSentinels,
    check_tokenizer,
    load_tokenizer,
    open_source,
    open_tokenizer,
    train_sentencepiece,
    with_spare_ids,
)
from moe_jax.errors import ConfigError

TRICKY = "\n\r\t \0\u2581\ue000\ue001\ufeff\u00a0enu<>s0xA/\u0085\u2028\U0001f600é"
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.text(st.sampled_from(TRICKY))


@pytest.fixture(scope="session")
def sentencepiece(library):
    return open_tokenizer(library)


def assert_lossless(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode("utf-8"))
    assert not np.isin(ids, [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id]).any()


def test_bytes_by_hand():
    tokenizer = Bytes()
    np.testing.assert_array_equal(tokenizer.encode("aé\n"), [100, 198, 172, 13])
    assert tokenizer.decode([1, 100, 198, 172, 13, 2, 0]) == "aé\n"
    assert tokenizer.vocab_size == len(tokenizer.byte_lengths) == 259
    assert [tokenizer.piece(i) for i in (0, 1, 2, 13, 100)] == [
        "<pad>", "<s>", "</s>", "<0x0A>", "a",
    ]  # fmt: skip


@given(TEXTS)
def test_bytes_are_lossless(text):
    assert_lossless(Bytes(), text)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_sentencepiece_is_lossless(sentencepiece, text):
    assert_lossless(sentencepiece, text)


def test_sentencepiece_is_lossless_on_real_documents(sentencepiece, library):
    source = open_source(library, "eval")
    for index in range(0, len(source), 4):
        assert_lossless(sentencepiece, source[index])


def test_tokens_span_spaces_and_lines(sentencepiece, library):
    pieces = {sentencepiece.piece(i) for i in range(sentencepiece.vocab_size)}
    assert any(piece.startswith("\n    ") for piece in pieces)
    assert any("):\n" in piece for piece in pieces)
    source = open_source(library, "eval")
    text = "".join(source[i] for i in range(len(source)))
    assert len(text.encode()) / len(sentencepiece.encode(text)) > 3.5
    assert sentencepiece.vocab_size == 4096


def test_specials_are_the_first_ids(sentencepiece):
    assert (sentencepiece.pad_id, sentencepiece.bos_id, sentencepiece.eos_id) == (0, 1, 2)
    assert sentencepiece.byte_lengths.shape == (4096,)
    assert not sentencepiece.byte_lengths[:4].any() and (sentencepiece.byte_lengths[4:] > 0).all()
    assert sentencepiece.decode([0, 1, 2, 3]) == ""


def test_training_is_deterministic_and_cached(tmp_path):
    config = DataConfig(source="mixture", vocab_size=300, data_dir=str(tmp_path))
    config = dataclasses.replace(
        config, mixture=dataclasses.replace(config.mixture, num_documents=64)
    )
    first = open_tokenizer(config)
    (cached,) = (tmp_path / "tokenizers").iterdir()
    assert cached.read_bytes() == first.model
    assert train_sentencepiece(open_source(config, "train"), 300).model == first.model
    before = cached.stat().st_mtime_ns
    assert open_tokenizer(config).model == first.model
    assert cached.stat().st_mtime_ns == before
    open_tokenizer(dataclasses.replace(config, vocab_size=301))
    assert len(list((tmp_path / "tokenizers").iterdir())) == 2


def test_save_and_load(sentencepiece, tmp_path):
    sentencepiece.save(tmp_path / "sp")
    Bytes().save(tmp_path / "bytes")
    loaded = load_tokenizer(tmp_path / "sp")
    assert loaded.model == sentencepiece.model
    assert isinstance(load_tokenizer(tmp_path / "bytes"), Bytes)
    path = tmp_path / "sp" / "tokenizer.model"
    opened = open_tokenizer(DataConfig(tokenizer=f"sentencepiece:{path}"))
    assert opened.model == sentencepiece.model
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.model"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_named_with_what_to_do(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    path = tmp_path / "tokenizer.model"
    with pytest.raises(ConfigError, match=f"^{path} cannot serve .*back from a copy") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=f"^{path} cannot serve .*choose another data.tokenizer"):
        check_tokenizer(DataConfig(tokenizer=f"sentencepiece:{path}"))
    config = DataConfig(source="mixture", vocab_size=300, data_dir=str(tmp_path))
    mixture = dataclasses.replace(config.mixture, num_documents=8)
    config = dataclasses.replace(config, mixture=mixture)
    open_tokenizer(config)
    (cached,) = (tmp_path / "tokenizers").iterdir()
    cached.write_bytes(cached.read_bytes()[:100])
    with pytest.raises(ConfigError, match=f"^{cached} cannot serve .*delete it"):
        open_tokenizer(config)


def test_damaged_sentinels_are_named(tmp_path):
    WithSentinels(Bytes(), 7).save(tmp_path)
    assert load_tokenizer(tmp_path).sentinels == 7
    (tmp_path / "sentinels.json").write_text("{")
    with pytest.raises(ConfigError, match="sentinels.json is damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"vocab_size": "many"}'])
def test_a_damaged_file_of_spare_ids_is_one_line_with_its_name(tmp_path, content):
    tokenizer = with_spare_ids(Bytes(), 270)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.vocab_size == 270
    assert loaded.byte_lengths.tolist() == [0] * 3 + [1] * 256 + [0] * 11
    assert (loaded.piece(100), loaded.piece(269)) == ("a", "<spare_269>")
    (tmp_path / "spare_ids.json").write_text(content)
    with pytest.raises(ConfigError, match="spare_ids.json is damaged") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_data_directory_that_takes_no_files_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    mixture = MixtureConfig(num_documents=8)
    config = DataConfig(
        source="mixture", vocab_size=300, data_dir=str(tmp_path / "file" / "x"), mixture=mixture
    )
    with pytest.raises(ConfigError, match="cannot be written .*set data.data_dir") as error:
        open_tokenizer(config)
    assert "\n" not in str(error.value)


def test_lossy_model_is_refused():
    import io

    import sentencepiece as spm

    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f"] * 20),
        model_writer=model,
        vocab_size=270,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="not lossless"):
        SentencePiece(model.getvalue())
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        SentencePiece(b"nonsense")


@pytest.mark.parametrize(
    ("fields", "kind", "match"),
    [
        ({"tokenizer": "byte"}, ValueError, "unknown"),
        ({"tokenizer": "sentencepiece:/nonexistent.model"}, FileNotFoundError, "no model file"),
        ({"vocab_size": 100}, ValueError, "at least 263"),
    ],
)
def test_errors_are_early_and_on_one_line(fields, kind, match):
    with pytest.raises(kind, match=match) as error:
        check_tokenizer(DataConfig(**fields))
    assert "\n" not in str(error.value)
