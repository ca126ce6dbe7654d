"""Documents that are read through a model whose router sends known tokens to known experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import models
from moe_jax.analysis import observed
from moe_jax.analysis.atlas import layers_of
from moe_jax.analysis.foresight import foresight
from moe_jax.analysis.forward import sparse_layers
from moe_jax.analysis.observed import alignment, observe, similarities
from moe_jax.analysis.texts import Text
from moe_jax.interop.huggingface import load
from moe_jax.models import EncoderDecoder
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.routing import preset
from tests.parity import compare_models as compare

ROWS = [[1, 2, 3, 4, 5], [3, 1, 3], [6, 7, 8, 1]]
TEXTS = [Text(row) for row in ROWS]
SOURCES = [[9, 8, 7], [2], [5, 6]]
PAIRS = [Text(row, source) for row, source in zip(ROWS, SOURCES, strict=True)]


@pytest.fixture(scope="module")
def model():
    """Two layers with experts of a hash of the token id; experts 0 and 1 of layer 0 are equal."""
    moe = MoEConfig(
        every=1,
        num_experts=4,
        expert_dim=8,
        group_size=64,
        router=preset("hash", capacity_factor=8.0),
    )
    config = models.DecoderConfig(num_layers=2, width=16, num_heads=2, mlp_dim=16, moe=moe)
    made = models.make(config, 16, jax.random.key(0))
    (first, *_) = made.layers.layers()
    for name in ("up", "down"):
        weights = getattr(first.block.feed_forward.experts, name)
        at = () if first.entry is None else (first.entry,)
        weights[...] = weights[...].at[(*at, 1)].set(weights[...][(*at, 0)])
    return made


def test_a_hash_router_has_all_information_about_its_experts(model):
    (found,) = observe(model, TEXTS, batch_size=2)
    assert found.tokens.tolist() == sum(ROWS, [])
    assert found.documents.tolist() == [0] * 5 + [1] * 3 + [2] * 4
    assert np.isnan(found.losses).nonzero()[0].tolist() == [4, 7, 11]
    for layer, own in zip(layers_of(found, None), found.layers, strict=True):
        for token in set(found.tokens.tolist()):
            assert len(set(own.wanted[found.tokens == token, 0])) == 1
        load = np.array(layer["load"])
        entropy = -(load[load > 0] * np.log(load[load > 0])).sum()
        assert layer["information"]["token"] == pytest.approx(entropy)


def test_a_loss_is_that_of_the_document_alone(model):
    (together,) = observe(model, TEXTS, batch_size=3)
    (alone,) = observe(model, TEXTS[1:2], batch_size=1)
    np.testing.assert_allclose(together.losses[5:7], alone.losses[:2], atol=1e-5)


def test_equal_experts_are_similar(model):
    first, second = similarities(model, TEXTS, 2)
    for one in (first.weights, first.outputs):
        assert one[0, 1] == pytest.approx(1, abs=1e-5) and one[0, 2] < 0.99
    np.testing.assert_allclose(jnp.diagonal(second.outputs), 1, atol=1e-5)
    assert second.weights[0, 1] < 0.5


def test_short_documents_drop_tokens_as_long_ones_do():
    # Equal ids go to one expert, and each document is a group. With a factor of 1, an expert of
    # four has a slot for a quarter of the tokens of a document, whatever padding surrounds them.
    router = preset("hash", capacity_factor=1.0)
    one_slot = dataclasses.replace(router.capacity, minimum=1, eval_factor=1.0, dropless="never")
    moe = MoEConfig(
        every=1,
        num_experts=4,
        expert_dim=8,
        group_size=16,
        router=dataclasses.replace(router, capacity=one_slot),
    )
    config = models.DecoderConfig(num_layers=1, width=16, num_heads=2, mlp_dim=16, moe=moe)
    made = models.make(config, 16, jax.random.key(0))
    (found,) = observe(made, [Text([5] * 4), Text([5] * 16)], batch_size=3)
    dropped = found.layers[0].dropped[:, 0]
    assert dropped.sum() == 3 + 12
    assert [dropped[found.documents == number].mean() for number in (0, 1)] == [0.75, 0.75]


def test_outputs_are_compared_on_tokens_of_all_documents(model, monkeypatch):
    seen = []

    def recording(outputs, used):
        seen.append((outputs, used))
        return jnp.zeros((4, 4))

    monkeypatch.setattr(observed, "alignment", recording)
    # 8 tokens of each of 16 documents; the shortest ones have fewer.
    texts = [Text([number % 16] * (3 if number % 2 else 20)) for number in range(32)]
    similarities(model, texts, 4)
    outputs, used = seen[0]
    assert outputs.shape[1] == len(used) == 16 * 8
    documents = used.reshape(16, 8).sum(1)
    assert set(documents.tolist()) == {3, 8}


def test_alignment_ignores_rotation_and_scale():
    generator = np.random.default_rng(0)
    y = generator.normal(size=(6, 3))
    rotation, _ = np.linalg.qr(generator.normal(size=(3, 3)))
    outputs = jnp.array([y, 2 * y @ rotation + 1, generator.normal(size=(6, 3))])
    found = alignment(outputs, jnp.ones(6, bool))
    assert found[0, 1] == pytest.approx(1, abs=1e-5) and found[0, 2] < 0.9
    # Tokens that fill a batch do not count.
    longer = jnp.concatenate([outputs, outputs[:, :1], outputs[:, :1]], 1)
    np.testing.assert_allclose(alignment(longer, jnp.arange(8) < 6), found, atol=1e-6)


@pytest.mark.parametrize("case", compare.MIXTURES)
def test_every_family_is_observed(case, tmp_path):
    compare.recorded(case, tmp_path)
    model = load(tmp_path).model
    pairs = isinstance(model, EncoderDecoder)
    texts = PAIRS if pairs else TEXTS
    found = observe(model, texts, batch_size=2)
    layers = [layer for one in found for layer in layers_of(one, np.array([0, 1, 1]))]
    alike = similarities(model, texts, 2)
    ahead = foresight(model, texts, found, batch_size=2)
    assert len(layers) == len(alike) == len(ahead) == len(sparse_layers(model))
    for layer in layers:
        assert sum(layer["load"]) == pytest.approx(1)
    assert np.isfinite(found[-1].losses).sum() == 12 - 3
    if pairs:
        encoder, decoder = found
        assert encoder.tokens.tolist() == sum(SOURCES, []) and np.isnan(encoder.losses).all()
        assert encoder.documents.tolist() == [0, 0, 0, 1, 2, 2]
        assert encoder.positions.tolist() == [0, 1, 2, 0, 0, 1]
        assert decoder.tokens.tolist() == sum(ROWS, [])
        assert {one.name.split()[1] for one in encoder.layers} == {"encoder"}


def test_an_encoder_is_observed_without_losses():
    moe = MoEConfig(every=1, num_experts=4, expert_dim=8, group_size=64, router=preset("mixtral"))
    config = models.DecoderConfig(
        num_layers=1, width=16, num_heads=2, mlp_dim=16, moe=moe, causal=False
    )
    (found,) = observe(models.make(config, 16, jax.random.key(0)), TEXTS, batch_size=3)
    assert np.isnan(found.losses).all() and found.layers[0].choices.shape == (12, 2)
