"""Log-likelihoods of texts, against a softmax by NumPy and against whole windows."""

import math

import jax
import numpy as np
import pytest
from absl import flags

from moe_jax import data, models
from moe_jax.cli import score as command
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import FAMILIES, save
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.routing import preset
from moe_jax.run.loaded import LoadedModel
from moe_jax.run.scoring import ScoringModel, open_model, require_causal, scores
from tests.data.test_hf_tokenizer import byte_level
from tests.test_face import TINY_MIXTRAL


def expert_choice():
    """A decoder whose experts choose tokens."""
    moe = MoEConfig(router=preset("expert_choice"), allow_future_leak=True)
    return models.DecoderConfig(moe=moe)


TEXTS = ["def f(x):", "", "ü", "return x + 1\n" * 3]


@pytest.fixture(scope="module")
def opened():
    """A tiny Mixtral of bytes, which reads 16 tokens at once."""
    tokenizer = data.open_tokenizer(data.DataConfig(tokenizer="bytes"))
    config = FAMILIES["mixtral"].read({**TINY_MIXTRAL, "vocab_size": tokenizer.vocab_size})
    model = models.make(config, tokenizer.vocab_size, jax.random.key(0))
    return ScoringModel(model, tokenizer, window=16)


def expected(opened, text):
    """The log-likelihoods by one forward pass over the whole text and a softmax in float64."""
    tokenizer = opened.tokenizer
    row = [tokenizer.bos_id, *tokenizer.encode(text).tolist()]
    model = LoadedModel(opened.model, tokenizer.vocab_size, "mixtral", {}, None)
    logits = np.asarray(model.logits([row[:-1]])[0], np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logs[np.arange(len(row) - 1), row[1:]]


def test_a_score_is_the_log_softmax_of_the_next_token(opened):
    found = list(scores(opened, TEXTS, window=64))
    for text, score in zip(TEXTS, found, strict=True):
        assert bytes(opened.tokenizer.decode(np.array(score.tokens)), "utf-8") == text.encode()
        assert score.size == len(text.encode()) == len(score.tokens) == len(score.log_likelihoods)
        if text:
            np.testing.assert_allclose(score.log_likelihoods, expected(opened, text), atol=1e-5)
    assert found[1].log_likelihood == 0 and found[1].bits_per_byte is None
    # A random model of V tokens is about as good as a uniform one.
    bits = math.log2(opened.tokenizer.vocab_size)
    assert found[0].bits_per_byte == pytest.approx(bits, rel=0.1)
    assert found[0].log_likelihood == pytest.approx(sum(found[0].log_likelihoods))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_score_is_independent_of_the_batch(opened, batch_size):
    together = list(scores(opened, TEXTS))
    other = list(scores(opened, TEXTS, batch_size=batch_size))
    for one, two in zip(together, other, strict=True):
        assert one.tokens == two.tokens
        np.testing.assert_allclose(one.log_likelihoods, two.log_likelihoods, atol=1e-5)


@pytest.mark.parametrize(("window", "overlap"), [(5, 0), (5, 2), (8, 7)])
def test_a_later_window_has_the_overlap_as_context(opened, window, overlap):
    (text,) = ["return x + 1"]  # 12 tokens
    row = [opened.tokenizer.bos_id, *opened.tokenizer.encode(text).tolist()]
    (found,) = scores(opened, [text], window=window, overlap=overlap)
    scored = 0
    while scored < len(text):
        start = max(scored - overlap, 0)
        part = row[start : start + window + 1]
        model = LoadedModel(opened.model, opened.tokenizer.vocab_size, "mixtral", {}, None)
        logits = np.asarray(model.logits([part[:-1]])[0], np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        logs = logs[np.arange(len(part) - 1), part[1:]][scored - start :]
        mine = found.log_likelihoods[scored : scored + len(logs)]
        np.testing.assert_allclose(mine, logs, atol=1e-5)
        scored += len(logs)
    assert scored == len(found.log_likelihoods)


def test_a_whole_context_beats_no_context_only_by_what_is_read(opened):
    whole = list(scores(opened, TEXTS, window=64))[3]
    cut = list(scores(opened, TEXTS, window=16))[3]
    np.testing.assert_allclose(cut.log_likelihoods[:16], whole.log_likelihoods[:16], atol=1e-5)
    assert not np.allclose(cut.log_likelihoods[16:], whole.log_likelihoods[16:], atol=1e-5)


def test_an_overlap_is_below_the_window(opened):
    with pytest.raises(ConfigError, match="--overlap=16 is not below --window=16: lower it"):
        list(scores(opened, TEXTS, overlap=16))


def test_a_wrong_overlap_is_named_before_anything_is_read():
    values = flags.FlagValues()
    command.define(values)
    values(["score", "--model=no", "--file=no", "--window=16", "--overlap=16"])
    with pytest.raises(ConfigError, match="--overlap=16 is not below --window=16: lower it"):
        command.main(values)


def test_a_folder_without_a_model_or_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match="holds no run, no converted model and no model of"):
        open_model(tmp_path)
    model = models.make(FAMILIES["mixtral"].read(TINY_MIXTRAL), 96, jax.random.key(0))
    save(model, tmp_path / "bare", "mixtral", original=TINY_MIXTRAL)
    with pytest.raises(ConfigError, match="bare has no tokenizer: copy its tokenizer.json"):
        open_model(tmp_path / "bare")
    with pytest.raises(ConfigError, match="--step selects a checkpoint of a run"):
        open_model(tmp_path / "bare", step=3)


def test_a_released_model_scores_with_its_own_tokenizer(tmp_path):
    folder = tmp_path / "released"
    original = {**TINY_MIXTRAL, "vocab_size": 280}
    model = models.make(FAMILIES["mixtral"].read(original), 280, jax.random.key(0))
    save(model, folder, "mixtral", original=original)
    byte_level(folder)
    opened = open_model(folder)
    (found,) = scores(opened, ["def f(x)"], window=32)
    assert opened.tokenizer.decode(np.array(found.tokens)) == "def f(x)"
    np.testing.assert_allclose(found.log_likelihoods, expected(opened, "def f(x)"), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (models.EncoderDecoderConfig(), "reads two texts"),
        (models.DecoderConfig(causal=False), "reads later tokens"),
        (expert_choice(), "experts choose among tokens"),
    ],
)
def test_a_model_that_reads_later_tokens_is_refused(config, reason):
    with pytest.raises(ConfigError, match=reason):
        require_causal(config)
