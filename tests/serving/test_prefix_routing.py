"""Tokens of a shared prefix keep the experts that they got first."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax.analysis.routing_table import RoutingTable, install
from moe_jax.decoding import Sampling
from moe_jax.models import Decoder
from moe_jax.serving import Engine, Request
from tests.serving.test_engine import DROPLESS, LENGTH, MORE, SMALL, VOCAB, answers

PREFIX = tuple(np.random.default_rng(7).integers(0, VOCAB, 16).tolist())


def carried():
    """A model whose routers read values of the routers before."""
    return Decoder(MORE["carried"], VOCAB, jax.random.key(1))


def with_table():
    """A model whose routers read experts 0 and 1 for every second token id."""
    model = Decoder(dataclasses.replace(SMALL, moe=DROPLESS), VOCAB, jax.random.key(1))
    experts, gates = np.tile([0, 1], (VOCAB, 1)), np.full((VOCAB, 2), 0.5, np.float32)
    experts[::2], gates[::2] = -1, 0
    install(model, RoutingTable(((experts, gates),) * model.layers.num_sparse))
    return model


@pytest.mark.parametrize("made", [carried, with_table])
def test_a_shared_prefix_is_routed_once(made):
    engine = Engine(made(), slots=2, length=LENGTH, prefill=8, page=4, logprobs=1)
    requests = [Request((*PREFIX, last), Sampling(4, 0.0)) for last in (1, 2)]
    first = answers(engine, requests[:1])
    load = [layer.copy() for layer in engine.load]
    second = answers(engine, requests[1:])
    read = [after.sum() - before.sum() for after, before in zip(engine.load, load, strict=True)]
    # The second request reads its last token and three of its four samples in every MoE layer.
    choices = [layer.sum() / (17 + 3) for layer in load]
    assert engine.prefill.shared == 16
    np.testing.assert_allclose(read, [4 * each for each in choices], rtol=0.3)
    alone = Engine(made(), slots=2, length=LENGTH, prefill=8, page=4, logprobs=1)
    assert answers(alone, requests[1:]) == second != first
