"""Predictions of the next layer's experts, by models whose predictions are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import models
from moe_jax.analysis.foresight import foreseen, foresight, score
from moe_jax.analysis.forward import forward, sparse_layers
from moe_jax.analysis.observed import ObservedLayer, observe
from moe_jax.analysis.texts import Text, batch_of
from moe_jax.interop.huggingface import load
from moe_jax.models import Decoder
from moe_jax.nn.mode import Mode
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.routing import preset
from tests.parity import compare_models as compare

TEXTS = [Text([1, 2, 3, 4, 5]), Text([3, 1, 3]), Text([6, 7, 8, 1])]


def _model(scan, router="mixtral"):
    moe = MoEConfig(
        every=1,
        num_experts=8,
        expert_dim=8,
        group_size=64,
        router=preset(router),
        allow_future_leak=True,
    )
    config = models.DecoderConfig(
        num_layers=2, width=16, num_heads=2, mlp_dim=16, moe=moe, scan_layers=scan
    )
    return models.make(config, 16, jax.random.key(0))


def _silence(model):
    """Makes all branches add zero to the residual stream, so that it is the same in all layers."""
    for layer in model.layers.layers():
        layer.block.attention.output[...] = jnp.zeros_like(layer.block.attention.output[...])
        down = layer.block.feed_forward.experts.down
        down[...] = jnp.zeros_like(down[...])


@pytest.mark.parametrize(
    ("scan", "router"), [(True, "mixtral"), (False, "mixtral"), (False, "expert_choice")]
)
def test_a_residual_stream_that_stays_predicts_every_choice(scan, router):
    model = _model(scan, router)
    _silence(model)
    found = foresight(model, TEXTS, observe(model, TEXTS, 3), 3)
    assert [one and one["accuracy"] for one in found] == [1, None]
    assert found[0]["chance"] < 1


def test_a_stream_that_changes_predicts_some():
    model = _model(True)
    found = foresight(model, TEXTS, observe(model, TEXTS, 3), 3)
    assert 0 < found[0]["accuracy"] < 1 and found[1] is None


def test_scores_by_hand():
    # Of the choices 0 1, 0 2 and 0 3, the predictions 1 0, 0 3 and 3 2 hold 2, 1 and 1. The most
    # frequent experts are 0 and, as the first of equals, 1: together 4 of 6 choices.
    wanted = np.array([[0, 1], [0, 2], [0, 3]])
    predicted = np.array([[1, 0], [0, 3], [3, 2]])
    layer = ObservedLayer("layer 0", 4, wanted, np.ones((3, 2)))
    assert score(predicted, layer) == {"accuracy": pytest.approx(4 / 6), "chance": 4 / 6}


def test_scores_where_experts_choose_count_the_experts_that_took_a_token():
    # Expert 0 took tokens 0 and 1, expert 1 took token 0, and no expert took token 2. One expert
    # per token is predicted on average: 2 of 3 pairs are right, and so are 2 of 3 with expert 0.
    absent = -1 - 2
    taken = np.array([[0, 1], [0, absent], [absent, absent]])
    layer = ObservedLayer("layer 0", 2, taken, np.ones((3, 2)), experts_choose=True)
    predicted = np.array([[0, -1], [0, -1], [-1, 1]])
    assert score(predicted, layer) == {"accuracy": pytest.approx(2 / 3), "chance": 2 / 3}


@pytest.mark.parametrize("case", compare.MIXTURES)
def test_every_family_predicts_between_neighbours(case, tmp_path):
    compare.recorded(case, tmp_path)
    model = load(tmp_path).model
    batch = batch_of(TEXTS, 3, 5)
    if not isinstance(model, Decoder):
        batch |= {f"encoder_{name}": batch[name] for name in ("inputs", "segments")}
    found = foreseen(model, batch)
    _, reports = forward(model, batch, Mode("full", record=True))
    assert len(found) == len(reports) == len(sparse_layers(model))
    assert found[-1] is None
    for predicted, after in zip(found, reports[1:], strict=False):
        if predicted is not None:
            assert predicted.shape == after.choices.shape
            assert -1 <= predicted.min() <= predicted.max() < after.counts.demand.shape[-1]
            # Every token has a prediction, and padding has none.
            valid = np.asarray(after.wanted).any(-1)
            np.testing.assert_array_equal((np.asarray(predicted) >= 0).any(-1), valid)
