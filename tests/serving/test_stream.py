"""Windows of a served stream whose data, router or neither changes, by hand and in an engine."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from scipy.spatial.distance import jensenshannon

from moe_jax import routing
from moe_jax.decoding import Sampling
from moe_jax.models import Decoder
from moe_jax.models.config import SparseLayer
from moe_jax.monitor import DeadExperts, Drift, Overload, SaturatedGates, SilentBalance
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.serving import (
    BalancedEngine,
    Engine,
    LookaheadModule,
    Offload,
    Request,
    Speculation,
)
from moe_jax.serving.stream import ServedWindow, StreamJudge, TrafficRules
from moe_jax.serving.traffic import Traffic, layers_of
from tests.serving.test_balance import compilations
from tests.serving.test_engine import SIZES, answers
from tests.test_decoding import MOE, SMALL, VOCAB

LAYER = SparseLayer("moe", 1, MoEConfig(num_experts=2), "", (8, 8))
# The router of the first window sends the tokens 5 and 6 to the experts 0 and 1.
EXPERTS = {5: 0, 6: 1}


def window(tokens, experts=EXPERTS):
    """A window of one layer; its tokens are of two requests in turn."""
    choices = np.array([[[experts[token], -1] for token in tokens]], np.int16)
    return ServedWindow(np.array(tokens), np.arange(len(tokens)) // 2, choices)


def judge(*alarms, reference=None, said=None, stream=None):
    say = (lambda words: None) if said is None else said.append
    streams = {} if stream is None else {"": stream.observed((LAYER,))}
    rules = TrafficRules(alarms, {"": reference}, say=say, streams=streams)
    return StreamJudge(rules, (LAYER,))


def test_other_data_are_a_drift_of_the_data():
    one = judge(Drift(above=0.2))
    assert one.see(window([5, 6, 5, 6])).alarms == {}
    found = one.see(window([5, 5, 5, 5]))
    distance = jensenshannon([1 / 2, 1 / 2], [1, 0], base=2)
    assert found.drift["drifted"] == "data" and found.tokens == 8
    assert found.drift["tokens"] == pytest.approx(distance)
    assert found.drift["layers"] == [
        {"layer": "1", "load": pytest.approx(distance), "same_tokens": 0, "by_chance": 0}
    ]
    far = "at a distance of 0.558 from the"
    assert found.alarms == {
        "Drift": {
            "all": f"the token ids are {far} first window, above 0.2: drift of the data",
            "1": f"the load is {far} reference (the first window), above 0.2: drift of the data",
        }
    }


def test_a_router_that_exchanges_experts_drifts_under_the_same_load():
    one = judge(Drift(above=0.2))
    one.see(window([5, 6, 5, 6]))
    found = one.see(window([5, 6, 5, 6], {5: 1, 6: 0}))
    assert found.drift["drifted"] == "routing"
    assert found.drift["tokens"] == 0 == found.drift["layers"][0]["load"]
    assert found.alarms == {
        "Drift": {
            "1": "the experts of the same token ids are at a distance of 1.000 from the first "
            "window, above 0.2: drift of the routing"
        }
    }


def test_both_and_neither():
    one = judge(Drift(above=0.2))
    one.see(window([5, 6, 5, 6]))
    assert one.see(window([5, 5, 5, 5], {5: 1})).drift["drifted"] == "data and routing"
    words = one.state.alarms["Drift"]["1"]
    assert "above 0.2: drift of the data and of the routing; the experts of the same" in words
    assert one.see(window([6, 5, 6, 5])).drift["drifted"] == "none" and one.state.alarms == {}


def test_ids_and_experts_that_vary_between_requests_are_within_chance():
    # The two requests of the first window share no token id, so no distance is beyond chance.
    one = judge(Drift(above=0.2))
    one.see(window([5, 5, 6, 6]))
    found = one.see(window([5, 5, 5, 5]))
    assert found.drift["tokens_by_chance"] == 1 and found.drift["drifted"] == "none"
    assert found.alarms["Drift"]["1"].endswith("above 0.2: of unknown kind")


def test_a_reference_of_a_run_is_compared_from_the_first_window_on():
    line = {"step": 300, "layers": [{"layer": 1, "load": [0.0, 1.0]}]}
    one = judge(Drift(above=0.2), reference=line)
    words = "the load is at a distance of 1.000 from the reference (step 300), above 0.2"
    assert one.see(window([5, 5])).alarms == {"Drift": {"1": f"{words}: of unknown kind"}}


@pytest.mark.parametrize(
    ("tokens", "experts", "kind"),
    [([6, 6, 6, 6], EXPERTS, "data"), ([5, 6, 5, 6], {5: 1, 6: 1}, "routing")],
)
def test_the_first_window_is_compared_with_the_documents_of_a_reference(tokens, experts, kind):
    # The reference has equal loads, and the first window has all tokens on expert 1.
    line = {"step": 300, "layers": [{"layer": 1, "load": [0.5, 0.5]}]}
    one = judge(Drift(above=0.2), reference=line, stream=window([5, 6, 5, 6]))
    found = one.see(window(tokens, experts))
    assert found.drift["drifted"] == kind
    words = found.alarms["Drift"]["1"]
    assert words.startswith("the load is at a distance of 0.558 from the reference (step 300)")
    assert f"above 0.2: drift of the {kind}" in words
    about = "from the validation documents of the run, above 0.2"
    assert about in found.alarms["Drift"]["all" if kind == "data" else "1"]


def test_other_rules_read_the_loads_of_a_window():
    said = []
    one = judge(DeadExperts(), Overload(above=1.5), SaturatedGates(), SilentBalance(), said=said)
    for _ in range(2):
        found = one.see(window([5, 5, 5, 5, 5, 6]))
    words = "the largest load is 1.67 times the mean, above 1.5"
    assert found.alarms == {"Overload": {"1": words}} and found.drift is None
    assert said == [f"Overload in layer 1: {words}"]  # A lasting condition is said once.
    found = one.see(window([5, 5]))
    assert found.alarms["DeadExperts"]["1"] == "1 of 2 experts (1) had no token in the stream"
    assert found.record()["active_alarms"] == 2 and found.record()["judged_tokens"] == 14
    assert len(said) == 2
    assert found.names == ("DeadExperts", "Overload", "SaturatedGates", "SilentBalance")


CONFIG = dataclasses.replace(
    SMALL,
    num_layers=2,
    moe=dataclasses.replace(MOE, num_experts=8, every=1, router=routing.preset("mixtral")),
)


def with_columns_moved(model):
    """The model whose routers score expert ``e`` as they scored expert ``e - 3``."""
    model = jax.tree.map(lambda leaf: leaf, model)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, ConfiguredMoE):
            for name in module.router.names:
                weights = getattr(module.router, name)
                weights[...] = np.roll(weights[...], 3, axis=-1)
    return model


def requests(ids, seed, number=24):
    rng = np.random.default_rng(seed)
    drawn = rng.choice(ids, (number, 24))
    return [Request(tuple(row.tolist()), Sampling(2, 0.0)) for row in drawn]


# Both streams have the ids 4 to 7.
FEW, OTHERS = np.arange(8), np.arange(4, 16)


@pytest.mark.parametrize(
    ("changed", "ids", "kind"),
    [(False, FEW, "none"), (False, OTHERS, "data"), (True, FEW, "routing")],
)
def test_planted_streams_are_told_apart_by_engines(changed, ids, kind):
    model = Decoder(CONFIG, VOCAB, jax.random.key(1))
    traffic = Traffic(TrafficRules([Drift(above=0.3)], {"": None}, 24 * 24), layers_of(model))
    answers(Engine(model, **SIZES, traffic=traffic), requests(FEW, 0))
    traffic.wait()
    first = traffic.state.tokens
    assert first >= 24 * 24 and traffic.state.drift is None
    after = with_columns_moved(model) if changed else model
    answers(Engine(after, **SIZES, traffic=traffic), requests(ids, 1, 48))
    traffic.wait()
    assert traffic.state.tokens > first and traffic.state.drift["drifted"] == kind
    assert bool(traffic.state.alarms) == (kind != "none")


@pytest.mark.parametrize("way", ["dense first", "lookahead", "copies", "offload"])
def test_tokens_and_loads_are_those_without_alarms(way):
    config = CONFIG
    if way == "lookahead":
        config = dataclasses.replace(CONFIG, lookahead=1)
    if way == "dense first":
        config = dataclasses.replace(
            CONFIG, num_layers=3, moe=dataclasses.replace(CONFIG.moe, every=0, layers=(1, 2))
        )
    model = Decoder(config, VOCAB, jax.random.key(1))
    more = {
        "lookahead": {"speculation": Speculation(LookaheadModule())},
        "copies": {"copies": 2, "every": 5},
        "offload": {"offload": Offload(bytes=40_000)},
    }.get(way, {})
    make = BalancedEngine if way == "copies" else Engine
    rng = np.random.default_rng(3)
    asked = [
        Request(tuple(rng.integers(0, VOCAB, 9).tolist()), Sampling(6, t, seed=4))
        for t in (0.0, 1.0, 0.7, 0.0, 1.3)
    ]
    plain = make(model, **SIZES, **more)
    expected = answers(plain, asked)
    traffic = Traffic(TrafficRules([Drift()], {"": None}, 10**6), layers_of(model))
    watched = make(model, **SIZES, **more, traffic=traffic)
    assert compilations(lambda: expected.append(answers(watched, asked))) == []
    assert expected.pop() == expected
    tokens, numbers, choices = zip(*traffic._steps, strict=True)
    choices = np.concatenate(choices, axis=1)
    found = [np.bincount(layer[layer >= 0], minlength=8).tolist() for layer in choices]
    assert found == [load.tolist() for load in watched.load] == [x.tolist() for x in plain.load]
    tokens, numbers = np.concatenate(tokens), np.concatenate(numbers)
    if not watched.drafts.proposed:
        read = [[*one.prompt, *answer[:-1]] for one, answer in zip(asked, expected, strict=True)]
        assert [tokens[numbers == i].tolist() for i in range(1, 6)] == read


def test_an_error_of_the_alarms_is_said_and_ends_no_engine():
    said = []
    model = Decoder(CONFIG, VOCAB, jax.random.key(1))
    traffic = Traffic(TrafficRules([Drift()], {"": None}, 4, said.append), layers_of(model)[:1])
    found = answers(Engine(model, **SIZES, traffic=traffic), requests(FEW, 0, 1))
    traffic.wait()
    assert len(found[0]) == 2 and said[0].startswith("the alarms have failed: ValueError")
