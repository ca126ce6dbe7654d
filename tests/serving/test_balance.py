"""Experts that follow the traffic: equal loads of devices, equal tokens, nothing compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.decoding import Sampling, generate
from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, EncoderDecoder, EncoderDecoderConfig
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.run.opened import FolderModel
from moe_jax.serving import BalancedEngine, Request, engines
from tests.serving.test_engine import CONFIGS, SIZES, answers, on_mesh
from tests.test_decoding import MOE, SMALL, VOCAB

E = 16
# The table of the router gives each token id one expert, so Zipf's law of ids is that of experts.
HASHED = dataclasses.replace(
    SMALL,
    num_layers=2,
    moe=dataclasses.replace(MOE, num_experts=E, every=1, router=routing.preset("hash")),
)
ZIPF = 1 / np.arange(1, VOCAB + 1) ** 1.5


def zipf_requests(number, seed=5):
    rng = np.random.default_rng(seed)
    prompts = rng.choice(VOCAB, (number, 24), p=ZIPF / ZIPF.sum())
    return [Request(tuple(row.tolist()), Sampling(4, 0.0)) for row in prompts]


def compilations(function):
    """Names of the events of the compiler in a call."""
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    try:
        function()
    finally:
        jax.monitoring.clear_event_listeners()
    return [name for name in events if "compile" in name]


def unevenness(engine):
    """Load of the busiest device over the mean, of the layer where that is largest."""
    return max(loads.max() / loads.mean() for loads in engine.device_loads)


def test_zipf_traffic_is_even_after_a_placement_on_eight_devices():
    mesh = make_mesh(MeshConfig(expert=8))
    sizes = SIZES | {"slots": 8, "prefill": 8}
    engine = BalancedEngine(on_mesh(HASHED, mesh), **sizes, copies=8, mesh=mesh)
    requests = [zipf_requests(12, seed) for seed in (5, 6)]
    prompts = [list(each.prompt) for each in sum(requests, [])]
    model = Decoder(HASHED, VOCAB, jax.random.key(1))
    expected = generate(model, prompts, requests[0][0].sampling)
    found = answers(engine, requests[0])
    before = unevenness(engine)
    assert compilations(engine.balance) == []
    # Other requests, so that no page of the first ones is shared.
    assert compilations(lambda: found.extend(answers(engine, requests[1]))) == []
    assert found == expected
    assert engine.placements == 1 and before > 2 and unevenness(engine) < 1.4


@pytest.mark.parametrize("name", ["shared experts, dense first", "carried", "latent experts"])
def test_tokens_stay_equal_while_experts_move_at_every_third_step(name):
    model = Decoder(CONFIGS[name], VOCAB, jax.random.key(1))
    requests = zipf_requests(5)
    expected = generate(model, [list(each.prompt) for each in requests], requests[0].sampling)
    shapes = list(map(jnp.shape, jax.tree.leaves(model)))
    engine = BalancedEngine(model, **SIZES, copies=2, every=3)
    assert answers(engine, requests) == expected and engine.placements > 2
    # The model of the caller has no copies.
    assert list(map(jnp.shape, jax.tree.leaves(model))) == shapes


def test_loads_since_the_last_placement_decide():
    model = Decoder(dataclasses.replace(HASHED, num_layers=1), VOCAB, jax.random.key(1))
    opened, room = FolderModel(model, None, 16, VOCAB), engines.Room(1, 0, 16, copies=1)
    engine = engines.engine_of(opened, room)
    engine.balance()  # Nothing has been read, so the experts stay.
    assert isinstance(engine, BalancedEngine) and engine.placements == 0
    for token in (3, 4):
        answers(engine, [Request((token,) * 9, Sampling(1, 0.0))])
        (load,) = engine.recent_load
        busiest = int(load.argmax())
        assert load.sum() == 9 == load[busiest]
        engine.balance()
        (places,) = engine._places
        assert np.bincount(places)[busiest] == 2  # The further place is a copy of this expert.
        assert engine.recent_load[0].sum() == 0


def test_wrong_numbers_and_models_are_refused():
    model = Decoder(SMALL, VOCAB, jax.random.key(1))
    with pytest.raises(ConfigError, match="copies=-1 and every=0 must be at least 0"):
        BalancedEngine(model, **SIZES, copies=-1)
    mesh = make_mesh(MeshConfig(expert=8))
    with pytest.raises(ConfigError, match="6 places do not divide into 8 devices"):
        BalancedEngine(model, **SIZES, copies=2, mesh=mesh)
    dense = Decoder(
        dataclasses.replace(SMALL, moe=dataclasses.replace(MOE, every=0)), VOCAB, jax.random.key(1)
    )
    with pytest.raises(ConfigError, match="no experts to place"):
        BalancedEngine(dense, **SIZES, copies=2)
    both = EncoderDecoderConfig(
        encoder_layers=1, decoder_layers=1, width=8, num_heads=2, head_dim=4
    )
    with pytest.raises(ConfigError, match=r"use decoding\.translate"):
        BalancedEngine(EncoderDecoder(both, VOCAB, jax.random.key(0)), **SIZES, copies=2)
