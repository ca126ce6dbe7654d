"""An engine whose experts move gives the tokens of an engine that holds them all, to the bit."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moe_jax.decoding import Sampling
from moe_jax.errors import ConfigError
from moe_jax.models import Decoder
from moe_jax.nn.shared import SharedConfig
from moe_jax.offload import HostStore, NoPrediction, arrays_of
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.serving import (
    BalancedEngine,
    DraftModel,
    Engine,
    LookaheadModule,
    NGram,
    Offload,
    Request,
    Speculation,
    copy_experts,
)
from moe_jax.serving import offloading as module
from moe_jax.serving.placement import numbers_of_experts
from moe_jax.serving.program import StepInputs, StepShape, lowered, pages_of
from moe_jax.serving.resident import resident
from tests.serving.test_engine import CONFIGS, SIZES, drawn
from tests.test_decoding import MOE, SMALL, VOCAB

SHARED = dataclasses.replace(MOE, every=0, layers=(2, 3), shared=SharedConfig(8, mix="sigmoid"))
MORE = {
    "two layers": dataclasses.replace(SMALL, num_layers=2, moe=dataclasses.replace(MOE, every=1)),
    "gated shared expert": dataclasses.replace(SMALL, moe=SHARED),
    "lookahead": dataclasses.replace(SMALL, num_layers=2, lookahead=2),
    "scan": dataclasses.replace(SMALL, scan_layers=True, moe=dataclasses.replace(MOE, every=1)),
}
MODELS = {n: c for n, c in (CONFIGS | MORE).items() if n != "experts in attention"}
SHARES = (1.0, 0.5, 0.25, 0.12)


@pytest.fixture
def separate(monkeypatch):
    """Engines that hold all experts separate them, as they do those of larger models."""
    monkeypatch.setattr(module, "resident", functools.partial(resident, smallest=1))


def made(name, dtype="float32"):
    """A model, and the bytes of all its experts."""
    model = Decoder(
        dataclasses.replace((CONFIGS | MORE)[name], compute_dtype=dtype), VOCAB, jax.random.key(1)
    )
    layers = arrays_of(model, np.dtype(dtype))
    return model, sum(x.nbytes for layer in layers for own in layer for x in own.values())


def budget(model, whole, share):
    """A share of the experts' bytes, and at least those of one expert."""
    one = whole // sum(module.experts_per_layer(model))
    return Offload(max(int(share * whole), one))


def said(engine, requests):
    """All that the engine says of requests: tokens, log-probabilities, ends, loads."""
    for request in requests:
        engine.submit(request)
    found = []
    while engine.waiting or engine.running:
        found += engine.step()
    return found, [load.tolist() for load in engine.load]


def requests_of(seed, number=6):
    rng = np.random.default_rng(seed)
    return [dataclasses.replace(drawn(rng), logprobs=3) for _ in range(number)]


def equal(name, dtype, shares, **sizes):
    """Checks that budgets change nothing; returns the engines with budgets."""
    model, whole = made(name, dtype)
    expected = said(Engine(model, **SIZES, **sizes), requests_of(0))
    assert len(expected[0]) > 20
    engines = []
    for share in shares:
        engine = Engine(model, **SIZES, **sizes, offload=budget(model, whole, share))
        assert said(engine, requests_of(0)) == expected
        engines.append(engine)
    return engines


def test_a_step_within_a_budget_has_every_bit_of_the_whole_step():
    # Two requests read their first token, and a third one a chunk of three.
    model, total = made("two layers")
    shape = StepShape(slots=2, chunk=3, pages=1, page=4)
    inputs = StepInputs.empty(shape)
    inputs.tokens[:], inputs.positions[:], inputs.valid[:] = [3, 1, 4, 1, 5], [0, 0, 0, 1, 2], True
    inputs.entries[:], inputs.ends[:] = [4, 8, 12, 13, 14], [[0], [4]]
    inputs.tables[0][:], inputs.tables[1][:] = [[1], [2]], [[3]]
    plain, steps = (
        resident(model, smallest=1),
        module.LayeredSteps(model, budget(model, total, 0.25)),
    )
    layers = pages_of(plain, 16)
    leaves = jax.tree.leaves(plain)
    whole = lowered(plain, layers, shape, 3).compile()
    expected = jax.device_get(whole(leaves, layers, inputs))
    layers = pages_of(steps.model, 16)
    step = steps.compiled(layers, [shape], 3)[shape]
    found = step(jax.tree.leaves(steps.model), layers, inputs)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)
    counts = steps.counts
    assert 2 <= counts.wanted <= 8 and counts.loads > 0 and counts.predicted > 0


@pytest.mark.usefixtures("separate")
@pytest.mark.parametrize("name", MODELS)
def test_a_budget_changes_no_bit_in_any_model(name):
    equal(name, "float32", SHARES)


@pytest.mark.usefixtures("separate")
def test_a_budget_changes_no_bit():
    (engine,) = equal("two layers", "float32", [0.5])
    counts = engine.offloaded
    assert counts.loads > 0 and 0 < counts.hits < counts.wanted
    assert 0 < counts.right <= counts.predicted


@pytest.mark.usefixtures("separate")
@pytest.mark.parametrize("name", ["windows", "gated shared expert", "latent"])
def test_a_budget_changes_no_bit_in_bfloat16(name):
    equal(name, "bfloat16", SHARES)


@pytest.mark.usefixtures("separate")
@pytest.mark.parametrize("draft", ["ngram", "model", "lookahead"])
def test_a_budget_changes_no_bit_with_drafts(draft):
    drafters = {"ngram": NGram(2), "lookahead": LookaheadModule()}
    drafter = drafters.get(draft) or DraftModel(made("rotary")[0])
    name = "lookahead" if draft == "lookahead" else "windows"
    (engine,) = equal(name, "float32", [0.25], speculation=Speculation(drafter, tokens=2))
    assert engine.drafts.proposed > 0


def test_equal_layers_share_their_programs():
    # Four equal layers have five segments. Those before the experts of layers 1 and 2 are equal,
    # and the one before those of layer 3 foresees no choice. An expert's program is the fifth.
    config = dataclasses.replace(SMALL, moe=dataclasses.replace(MOE, every=1))
    engine = Engine(
        Decoder(config, VOCAB, jax.random.key(0)), 1, 16, 4, page=4, offload=Offload(2**20)
    )
    assert [len(step._segments) for step in engine._programs.values()] == [5, 5]
    assert len(engine._compute._host.programs) == 2 * (4 + 1)


@pytest.mark.usefixtures("separate")
def test_nothing_is_compiled_after_the_constructor():
    model, whole = made("windows")
    engine = Engine(model, **SIZES, offload=budget(model, whole, 0.25))
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    try:
        said(engine, requests_of(3))
    finally:
        jax.monitoring.clear_event_listeners()
    assert [name for name in events if "compile" in name or "trace" in name] == []


def test_without_predictions_nothing_is_predicted():
    model, whole = made("windows")
    plan = dataclasses.replace(budget(model, whole, 0.5), predictor=NoPrediction())
    engine = Engine(model, **SIZES, offload=plan)
    said(engine, [Request((3, 1, 4), Sampling(6))])
    assert engine.offloaded.predicted == 0 < engine.offloaded.wanted


def refused(match, name="windows", offload=None, engine=Engine, **sizes):
    model, _ = made(name)
    with pytest.raises(ConfigError, match=match) as error:
        engine(model, **SIZES, offload=offload or Offload(2**20), **sizes)
    assert len(str(error.value).splitlines()) == 1


def test_a_model_whose_experts_have_copies_is_refused():
    model = jax.tree.map(lambda leaf: leaf, made("windows")[0])
    copy_experts(model, [np.append(np.arange(n), [0, 1]) for n in numbers_of_experts(model)])
    with pytest.raises(ConfigError, match="before copy_experts"):
        Engine(model, **SIZES, offload=Offload(2**20))


def test_models_and_settings_that_no_budget_fits_are_refused():
    refused("does not hold expert 0 of MoE layer 0", offload=Offload(10))
    refused("leave the copies or the budget out", engine=BalancedEngine, copies=4)
    refused("and the mesh has 8", mesh=make_mesh(MeshConfig(expert=2, data=4)))
    refused(r"the store has \(4,\) experts", offload=Offload(1, store=HostStore([[{}] * 4])))


@pytest.mark.parametrize(
    ("moe", "match"),
    [
        ({"expert_dims": (4, 8)}, "MixedExperts for experts"),
        ({"expert_mask": 0.1}, "a layer needs slots"),
        ({"expert_dropout": 0.1}, "a layer needs slots"),
    ],
)
def test_layers_whose_experts_the_host_cannot_apply_are_refused(moe, match):
    moe = dataclasses.replace(MOE, **moe)
    config = dataclasses.replace(SMALL, moe=moe, scan_layers=False)
    model = jax.eval_shape(lambda: Decoder(config, VOCAB, jax.random.key(0)))
    with pytest.raises(ConfigError, match=match):
        module.without_experts(model)


def test_experts_of_an_attention_and_models_without_experts_are_refused():
    with pytest.raises(ConfigError, match="ProjectionExperts for experts"):
        made("experts in attention")
    config = dataclasses.replace(SMALL, moe=dataclasses.replace(MOE, every=0, layers=()))
    model = Decoder(config, VOCAB, jax.random.key(0))
    with pytest.raises(ConfigError, match="no experts to offload"):
        Engine(model, **SIZES, offload=Offload(2**20))
