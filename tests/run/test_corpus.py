"""Texts of a corpus, by hand: begin token, halves, and blanks that the target fills."""

import jax
import numpy as np
import pytest

from moe_jax import data, models
from moe_jax.data.sentinels import WithSentinels
from moe_jax.run.corpus import read
from moe_jax.run.opened import FolderModel

BYTES = data.Bytes()
TEXTS = ["the first text", "the second"]


def opened(config, tokenizer):
    """A model that is not computed, and its tokenizer."""
    size = tokenizer.vocab_size
    model = jax.eval_shape(lambda: models.make(config, size, jax.random.key(0)))
    return FolderModel(model, tokenizer, 64, size, start_id=0)


@pytest.mark.parametrize("causal", [True, False])
def test_one_stack_reads_the_begin_token_and_the_text(causal):
    model = opened(models.DecoderConfig(causal=causal), BYTES)
    texts, labels, sizes = read(model, [TEXTS, TEXTS[1:]], documents=2, length=10)
    assert [len(one.tokens) for one in texts] == [10, 10, 10] and labels.tolist() == [0, 0, 1]
    assert texts[0].tokens == [BYTES.bos_id, *BYTES.encode("the first").tolist()]
    assert sizes.tolist() == [9, 9, 9] and texts[0].source == ()


def test_without_sentinels_the_target_is_the_second_half():
    model = opened(models.EncoderDecoderConfig(), BYTES)
    (one,), _, sizes = read(model, [["abcde"]], documents=1, length=64)
    assert one.source == [*BYTES.encode("abc").tolist(), BYTES.eos_id]
    assert one.tokens == [0, *BYTES.encode("de").tolist()] and sizes.tolist() == [2]


def test_with_sentinels_source_and_target_restore_the_text():
    tokenizer = WithSentinels(BYTES, 100)
    model = opened(models.EncoderDecoderConfig(), tokenizer)
    texts, _, sizes = read(model, [TEXTS], documents=2, length=64)
    for one, text, size in zip(texts, TEXTS, sizes, strict=True):
        assert one.tokens[0] == 0 and one.source[-1] == tokenizer.eos_id
        blanks, filling = one.source[:-1], one.tokens[1:]
        cut = [i for i, token in enumerate(filling) if token >= BYTES.vocab_size]
        spans = {filling[i]: filling[i + 1 : j] for i, j in zip(cut, [*cut[1:], None], strict=True)}
        whole = [token for each in blanks for token in spans.get(each, [each])]
        assert BYTES.decode(np.array(whole)) == text
        # At a density of 0.15, 2 of 14 and 2 of 10 tokens are cut out.
        assert size == 2 == sum(map(len, spans.values()))
