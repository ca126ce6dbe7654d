"""Requests that share steps get the tokens that each of them gets alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import routing
from moe_jax.decoding import Sampling, generate
from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, EncoderDecoder, EncoderDecoderConfig
from moe_jax.nn.shared import SharedConfig
from moe_jax.parallel import MeshConfig, make_mesh, shardings_of_state
from moe_jax.run.scoring import _log_likelihoods
from moe_jax.serving import Ended, Engine, Request
from tests.test_decoding import MOE, SMALL, VARIANTS, VOCAB

LENGTH = 40
SIZES = {"slots": 4, "length": LENGTH, "prefill": 6, "page": 4, "logprobs": 3}
MORE = {
    "shared experts, dense first": dataclasses.replace(
        SMALL, moe=dataclasses.replace(MOE, every=0, layers=(2, 3), shared=SharedConfig(8))
    ),
    "carried": dataclasses.replace(
        SMALL,
        scan_layers=True,
        moe=dataclasses.replace(MOE, every=1, router=routing.preset("zaya", dim=4)),
    ),
    "latent experts": dataclasses.replace(SMALL, moe=dataclasses.replace(MOE, latent_dim=8)),
}
CONFIGS = VARIANTS | MORE
DROPLESS = dataclasses.replace(MOE, router=routing.preset("mixtral"), every=2)


def made(name, **sizes):
    model = Decoder(CONFIGS[name], VOCAB, jax.random.key(1))
    return model, Engine(model, **(SIZES | sizes))


def drained(engine):
    """Tokens of all requests until the engine is idle, by number."""
    found = {}
    while engine.waiting or engine.running:
        for token in engine.step():
            found.setdefault(token.request, []).append(token)
    return found


def answers(engine, requests):
    """Token ids of each request, all of them submitted at once."""
    numbers = [engine.submit(request) for request in requests]
    found = drained(engine)
    return [[token.token for token in found[number]] for number in numbers]


def drawn(rng, longest=20):
    """A request of random length, half of them greedy."""
    prompt = rng.integers(0, VOCAB, rng.integers(1, longest)).tolist()
    sampling = Sampling(
        tokens=int(rng.integers(1, 12)),
        temperature=float(rng.choice([0.0, 0.7, 1.5])),
        top_k=int(rng.choice([0, 3])),
        top_p=float(rng.choice([0.6, 1.0])),
        seed=int(rng.integers(0, 2**32)),
        eos_id=int(rng.choice([-1, 5])),
    )
    return Request(tuple(prompt), sampling)


def mixed(engine, requests, rng):
    """Token ids of requests that arrive between steps, beside some that are cancelled."""
    numbers, found, rest = [], {}, list(requests)
    while rest or engine.waiting or engine.running:
        while rest and rng.random() < 0.5:
            numbers.append(engine.submit(rest.pop(0)))
        if rng.random() < 0.1:
            number = engine.submit(drawn(rng))
            for token in engine.step():
                found.setdefault(token.request, []).append(token.token)
            engine.cancel(number)
        for token in engine.step():
            found.setdefault(token.request, []).append(token.token)
    return [found[number] for number in numbers]


def same_in_any_mix(engine, number, seed):
    """Checks that requests get in a mix, with others beside them, what they get alone."""
    rng = np.random.default_rng(seed)
    requests = [drawn(rng) for _ in range(number)]
    alone = [answers(engine, [request])[0] for request in requests]
    assert mixed(engine, requests, rng) == alone
    assert len({tuple(row) for row in alone}) > number // 2


@pytest.fixture(scope="module")
def local():
    """A model with windows and an engine for it, which all tests leave idle."""
    return made("windows")


def greedy_equal(model, engine):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, size).tolist() for size in (1, 2, 6, 7, 13, 20)]
    greedy = Sampling(tokens=9, temperature=0.0)
    found = answers(engine, [Request(tuple(prompt), greedy) for prompt in prompts])
    assert found == generate(model, prompts, greedy)
    assert len({tuple(row) for row in found}) > 3


def test_greedy_tokens_are_those_of_generate(local):
    greedy_equal(*local)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_generate_in_every_model(name):
    model, engine = made(name)
    greedy_equal(model, engine)
    same_in_any_mix(engine, 6, 1)


def test_a_request_gets_the_same_tokens_in_any_mix(local):
    same_in_any_mix(local[1], 10, 0)


def test_a_request_gets_the_same_tokens_in_200_mixes(local):
    for seed in range(200):
        same_in_any_mix(local[1], 8, seed)


def test_few_pages_let_requests_wait_and_change_no_token():
    _, engine = made("windows", pages=12)
    same_in_any_mix(engine, 8, 3)
    assert engine.free_pages == 12


def test_nothing_is_compiled_after_the_constructor(local):
    _, engine = local
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    try:
        answers(engine, [drawn(np.random.default_rng(seed)) for seed in range(6)])
        traffic = [name for name in events if "compile" in name or "trace" in name]
        jax.jit(lambda x: x + len(events))(jnp.ones(3))
    finally:
        jax.monitoring.clear_event_listeners()
    assert traffic == []
    assert any("compile" in name for name in events)  # The listener hears of a new program.
    assert engine.programs == 2  # One width of tables, with and without a chunk.


def test_steps_of_few_requests_have_few_rows():
    # Requests in slots 1 and 2 have rows 0 and 1 once the request in slot 0 has ended.
    model, engine = made("windows", slots=8)
    assert {(each.slots, each.chunk) for each in engine._programs} == {
        (8, 6),
        (1, 6),
        (8, 0),
        (4, 0),
        (1, 0),
    }
    requests = [Request((3, size, 5), Sampling(size, temperature=0.0)) for size in (2, 9, 6)]
    expected = [generate(model, [request.prompt], request.sampling)[0] for request in requests]
    assert answers(engine, requests) == expected
    same_in_any_mix(engine, 8, 5)


def test_log_probabilities_are_those_of_scoring(local):
    model, engine = local
    prompt = (3, 1, 4, 1, 5, 9, 2, 6)
    sampling = Sampling(tokens=7, temperature=1.3, top_k=4, top_p=0.9, seed=3)
    number = engine.submit(Request(prompt, sampling, logprobs=3))
    tokens = drained(engine)[number]
    row = np.array([[*prompt, *(token.token for token in tokens)]])
    valid = np.ones((1, row.size - 1), bool)
    expected = _log_likelihoods(model, row[:, :-1], row[:, 1:], valid)[0, len(prompt) - 1 :]
    np.testing.assert_allclose([token.logprob for token in tokens], expected, atol=1e-5)
    for token in tokens:
        values = [value for _, value in token.top]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert token.logprob <= values[0] + 1e-6
        assert dict(token.top).get(token.token, token.logprob) == token.logprob
    assert [token.ended for token in tokens] == [None] * 6 + [Ended.LENGTH]


def test_a_request_ends_with_its_first_end_token(local):
    _, engine = local
    (whole,) = answers(engine, [Request((3, 1, 4), Sampling(9, 0.0))])
    number = engine.submit(Request((3, 1, 4), Sampling(9, 0.0, eos_id=(whole[-1], whole[3]))))
    tokens = drained(engine)[number]
    first = min(whole.index(whole[3]), whole.index(whole[-1]))
    assert [token.token for token in tokens] == whole[: first + 1]
    assert tokens[-1].ended is Ended.END


def test_a_common_prefix_is_computed_once(local):
    _, engine = local
    rng = np.random.default_rng(7)
    prefix = tuple(rng.integers(0, VOCAB, 18).tolist())
    requests = [Request((*prefix, last), Sampling(6, 0.0)) for last in (1, 2, 1)]
    before, earlier = dataclasses.replace(engine.prefill), sum(map(np.sum, engine.load))
    together = answers(engine, requests)
    # 19 tokens are 4 full pages of 4 and 3 more, of which the second computes the 3.
    assert engine.prefill.computed - before.computed == 19 + 3 + 3
    assert engine.prefill.shared - before.shared == 16 + 16
    # The last of 6 sampled tokens is not read; every other token has one expert in each MoE layer.
    read = 19 + 3 + 3 + 3 * 5
    assert sum(map(np.sum, engine.load)) - earlier == read * len(engine.load)
    alone = made("windows")[1]
    assert together == [answers(alone, [request])[0] for request in requests]
    assert together[0] == together[2] and engine.free_pages == 40


def test_cancel_frees_pages_and_slots_at_once(local):
    _, engine = local
    request = Request(tuple(range(20)), Sampling(10, 0.0))
    numbers = [engine.submit(request) for _ in range(6)]
    engine.step()
    assert (engine.running, engine.waiting) == (1, 5)
    assert engine.free_pages == 40 - 8  # 29 entries: the last sampled token is not read.
    engine.cancel(numbers[0])
    engine.cancel(numbers[3])
    assert (engine.running, engine.waiting, engine.free_pages) == (0, 4, 40)
    assert sorted(drained(engine)) == [n for n in numbers if n not in (numbers[0], numbers[3])]


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (Request(()), "the prompt is empty"),
        (Request((VOCAB,)), "token ids outside 0 to 22"),
        (Request((1,) * 30, Sampling(11)), "41 tokens, and a request has room for 40"),
        (Request((1,), Sampling(2), logprobs=4), "logprobs=4 must be between 0 and 3"),
    ],
)
def test_requests_that_do_not_fit_are_refused(local, request_, match):
    with pytest.raises(ConfigError, match=match):
        local[1].submit(request_)


def refused(model, match, **sizes):
    with pytest.raises(ConfigError, match=match):
        Engine(model, **(SIZES | sizes))


def test_models_and_sizes_that_do_not_fit_are_refused():
    def decoder(config):
        return nnx.eval_shape(lambda: Decoder(config, VOCAB, jax.random.key(0)))

    choice = routing.preset("expert_choice")
    config = dataclasses.replace(
        SMALL, moe=dataclasses.replace(MOE, router=choice, allow_future_leak=True)
    )
    refused(decoder(config), "experts choose among tokens")
    bounded = dataclasses.replace(DROPLESS, exchange="ragged", exchange_buffer=2.0)
    refused(decoder(dataclasses.replace(SMALL, moe=bounded)), "exchange_buffer drops choices")
    both = EncoderDecoderConfig(
        encoder_layers=1, decoder_layers=1, width=8, num_heads=2, head_dim=4
    )
    model = nnx.eval_shape(lambda: EncoderDecoder(both, VOCAB, jax.random.key(0)))
    refused(model, "an engine continues prompts and has no encoder")
    refused(decoder(VARIANTS["learned"]), "length=41", length=41)
    small = decoder(SMALL)
    refused(small, "slots=0 must be at least 1", slots=0)
    refused(small, "prefill=1 must be at least 2", prefill=1)
    refused(small, "pages=-1", pages=-1)


def on_mesh(config, mesh):
    """A model whose parameters are on the devices of a mesh."""
    model = Decoder(config, VOCAB, jax.random.key(1))
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.device_put(state, shardings_of_state(state, mesh)))


def same_on_mesh(config, mesh):
    rng = np.random.default_rng(4)
    requests = [drawn(rng) for _ in range(6)]
    model = Decoder(config, VOCAB, jax.random.key(1))
    expected = answers(Engine(model, **SIZES), requests)
    engine = Engine(on_mesh(config, mesh), **(SIZES | {"slots": 8, "prefill": 8}), mesh=mesh)
    assert answers(engine, requests) == expected
    return engine


@pytest.mark.parametrize("exchange", ["gspmd", "all_to_all", "ring"])
def test_tokens_on_data_and_expert_devices_are_those_of_one(exchange):
    # The engine sends choices in place of "gspmd", and keeps the two others.
    moe = dataclasses.replace(DROPLESS, transport="gather", exchange=exchange)
    config = dataclasses.replace(SMALL, num_layers=2, moe=moe)
    same_on_mesh(config, make_mesh(MeshConfig(data=2, expert=4)))


@pytest.mark.parametrize("name", ["windows", "latent", "carried"])
def test_tokens_on_data_expert_and_model_devices_are_those_of_one(name):
    engine = same_on_mesh(CONFIGS[name], make_mesh(MeshConfig(data=2, expert=2, model=2)))
    split = {leaf.sharding.spec for leaf in jax.tree.leaves(engine._layers)}
    # A device has the keys and values of its heads; the latents of a token have no heads.
    assert any("model" in spec for spec in split) == (name != "latent")
