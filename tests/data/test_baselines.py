import dataclasses
import zlib

import numpy as np
import pytest

from moe_jax.data import Bytes, baselines, best_possible_loss, make_mixture
from moe_jax.data.baselines import fit_order2
from moe_jax.data.config import DataConfig, MixtureConfig

from .corpora import write_corpus


def test_order2_by_hand():
    # Successors seen after (0, 0): a. After (0, a): b. Orders below: after a: b; after 0: a.
    order0 = {"a": 2 / 258, "b": 2 / 258, "c": 1 / 258}
    order1_a = (1 + 1 * order0["a"]) / 2  # after the byte 0
    order1_b = (1 + 1 * order0["b"]) / 2  # after the byte a
    first = (1 + 1 * order1_a) / 2
    second = (1 + 1 * order1_b) / 2
    expected = -np.log2(first) - np.log2(second)
    assert fit_order2([b"ab"]).bits([b"ab"]) == pytest.approx(expected)
    unseen = -np.log2(order0["c"] / 2 / 2)
    assert fit_order2([b"ab"]).bits([b"c"]) == pytest.approx(unseen)


@pytest.mark.parametrize("prefix", [b"", b"ab", b"zz", b"ocu"])
def test_order2_is_a_distribution(prefix):
    model = fit_order2([b"abracadabra", b"hocus"])
    bits = [model.bits([prefix + bytes([c])]) - model.bits([prefix]) for c in range(256)]
    assert np.sum(np.exp2(np.negative(bits))) == pytest.approx(1.0)


def test_empty_documents_do_not_count():
    assert fit_order2([b"ab", b""]).bits([b"", b"ab", b""]) == fit_order2([b"ab"]).bits([b"ab"])


def test_baselines_honour_eval_documents(tmp_path):
    source = write_corpus(tmp_path, ["abcabc" * 9] * 3, ["abc" * 50, "xyz" * 50])
    config = DataConfig(source=source, eval_documents=1)
    found = baselines(config)
    assert found["uniform"] == 8.0
    assert found["zlib"] == 8 * len(zlib.compress(b"abc" * 50, 9)) / 150
    assert found["order2"] < 1.0
    everything = baselines(dataclasses.replace(config, eval_documents=None))
    assert everything["order2"] > 2.0


def test_real_library(library):
    found = baselines(library)
    assert found["uniform"] == 8.0
    assert 2.2 < found["order2"] < 3.2
    assert 1.6 < found["zlib"] < 2.8


def test_the_best_possible_loss_is_between_being_told_the_language_and_a_guess():
    mixture = MixtureConfig(num_languages=3, num_symbols=8, document_length=40)
    config = DataConfig(source="mixture", tokenizer="bytes", mixture=mixture, eval_documents=50)
    found = best_possible_loss(config, Bytes())
    told = make_mixture(mixture).best_possible_loss() * 40 / 41
    # Finding out which of three languages it is costs at most log 3 nats a document.
    assert found == pytest.approx(told, abs=0.1)
    assert 0 < found < np.log(8)
    with pytest.raises(ValueError, match="'files:x' is not known"):
        best_possible_loss(dataclasses.replace(config, source="files:x"), Bytes())
