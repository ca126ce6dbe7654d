"""A recorded routing, and the same values and gradients from its replay."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.config.optimizer import OptimizerConfig
from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig, EncoderDecoderConfig
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.routing_log import RoutingRecord, check_replay
from moe_jax.training.state import Recipe
from moe_jax.training.step import Objective, train_step

VOCAB, ROWS, LENGTH, E = 32, 4, 16, 4
# A router, and the choices that make ``forced`` read its gates the same way. Few slots, so that
# some choices are lost, where there are slots at all.
PAIRS = {
    "switch": (
        {"capacity_factor": 0.5, "sample": True, "input_dropout": 0.1},
        {"k": 1, "input_jitter": 1e-2, "input_dropout": 0.1},
    ),
    "gshard": ({"capacity_factor": 1.0}, {"k": 2, "normalize": True}),
    "vmoe": ({"capacity_factor": 0.5}, {"k": 2, "noise_std": 1.0}),
    "fairseq_top2": ({"second": "random", "pad_mask": True}, {"k": 2, "renormalize": True}),
    "deepseek_v3": (
        {"k": 2, "groups": 2, "keep_groups": 1},
        {"k": 2, "scored_by": "sigmoid", "normalize": True, "scale": 2.5},
    ),
    "expert_choice": ({"capacity_factor": 1.0}, {"k": E}),
    "base": ({}, {"k": 1, "scored_by": "sigmoid"}),
}


@pytest.fixture(autouse=True, scope="module")
def fast_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def recipe(router, scan=True, kind="decoder"):
    moe = MoEConfig(
        every=1,
        num_experts=E,
        expert_dim=16,
        group_size=32,
        router=router,
        transport="gather",
        allow_future_leak=True,
    )
    shape = {"width": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 32, "scan_layers": scan}
    if kind == "encoder-decoder":
        shape |= {"encoder_layers": 2, "decoder_layers": 1, "encoder_moe": moe, "decoder_moe": moe}
        config = EncoderDecoderConfig(**shape)
    else:
        further = 1 if kind == "looking ahead" else 0
        config = DecoderConfig(**shape, num_layers=2, moe=moe, lookahead=further)
    mesh = make_mesh(MeshConfig(1), jax.devices()[:1])
    return Recipe(config, VOCAB, make_optimizer(OptimizerConfig(), 10), 0, mesh)


def batch():
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, VOCAB, (ROWS, LENGTH)) for name in ("inputs", "targets")}
    arrays["segments"] = np.ones((ROWS, LENGTH)) * (np.arange(LENGTH) < 13)
    arrays["positions"] = np.tile(np.arange(LENGTH), (ROWS, 1))
    return {name: array.astype(np.int32) for name, array in arrays.items()}


def measure(router, batch, microbatches=1, record=False, scan=True, kind="decoder"):
    made = recipe(router, scan, kind)
    graph, state = made.create()
    objective = Objective(microbatches, record=record)
    with jax.set_mesh(made.mesh):
        run = jax.jit(functools.partial(objective.value_and_gradient, graph))
        gradient, losses, layers, choices, _ = run(state, batch)
    return gradient, losses.loss, layers, tuple(map(np.asarray, choices)) if record else choices


@pytest.mark.parametrize("kind", ["looking ahead", "encoder-decoder"])
def test_every_stack_replays_its_own_choices(kind, tmp_path):
    choices, again = PAIRS["gshard"]
    router = dataclasses.replace(routing.preset("gshard", **choices), balance=())
    whole = batch()
    whole |= {"encoder_inputs": whole["targets"], "encoder_segments": whole["segments"]}
    gradient, loss, layers, chosen = measure(router, whole, 2, True, kind=kind)
    assert len(chosen) == len(layers) == 3
    record = RoutingRecord(tmp_path)
    record.write(1, whole, chosen)
    forced = routing.preset("forced", **again)
    replayed = {**whole, "routing": record.read(1, whole)}
    other_gradient, other_loss, _, _ = measure(forced, replayed, 2, kind=kind)
    np.testing.assert_array_equal(other_loss, loss)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-6 * max(np.abs(one).max(), 1e-6))


@pytest.mark.parametrize(
    ("name", "microbatches", "scan"),
    [*((name, 1, True) for name in PAIRS), ("gshard", 2, False), ("deepseek_v3", 2, False)],
)
def test_replay_has_the_loss_and_every_gradient_of_the_recorded_run(
    name, microbatches, scan, tmp_path
):
    choices, again = PAIRS[name]
    # Losses of the router itself are no part of a replay.
    router = dataclasses.replace(routing.preset(name, **choices), balance=())
    gradient, loss, layers, chosen = measure(router, batch(), microbatches, True, scan)
    assert any((layer < 0).any() for layer in chosen), "nothing was lost: the case shows little"
    record = RoutingRecord(tmp_path)
    record.write(1, batch(), chosen)
    forced = routing.preset("forced", **again)
    replayed = {**batch(), "routing": record.read(1, batch())}
    other_gradient, other_loss, other_layers, _ = measure(forced, replayed, microbatches, scan=scan)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    for layer, other in zip(layers, other_layers, strict=True):
        np.testing.assert_array_equal(other.counts.load, layer.counts.load)
    pairs = zip(jax.tree.leaves(other_gradient), jax.tree.leaves(gradient), strict=True)
    for got, wanted in pairs:
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6 * np.abs(wanted).max())


def test_replay_overrules_what_the_model_itself_would_choose():
    # Every token to expert 2, whatever the logits say.
    ones = np.full((ROWS, LENGTH, 1), 2, np.int32)
    replayed = {**batch(), "routing": (ones, ones)}
    _, _, layers, _ = measure(routing.preset("forced", k=1), replayed)
    for layer in layers:
        np.testing.assert_array_equal(layer.counts.load, [0, 0, ROWS * 13, 0])


def test_files_are_compact_and_whole(tmp_path):
    record = RoutingRecord(tmp_path / "routing")
    few = np.arange(-4, 4, dtype=np.int16).reshape(1, 4, 2)
    many = few * 100
    record.write(7, batch(), (few, many))
    first, second = record.read(7, batch())
    np.testing.assert_array_equal(first, few)
    np.testing.assert_array_equal(second, many)
    (path,) = (tmp_path / "routing").iterdir()
    with np.load(path) as file:
        assert (file["layer0000"].dtype, file["layer0001"].dtype) == (np.int8, np.int16)


def test_a_step_or_batch_that_was_not_recorded_is_refused(tmp_path):
    record = RoutingRecord(tmp_path)
    record.write(1, batch(), ())
    with pytest.raises(ConfigError, match="step 2 was not recorded"):
        record.read(2, batch())
    other = batch()
    other["inputs"] = other["inputs"][::-1]
    with pytest.raises(ConfigError, match="recorded for other tokens"):
        record.read(1, other)


def test_a_folder_without_every_step_is_refused_before_a_run_starts(tmp_path):
    check_replay("", steps=9, layers=[])  # a run that replays nothing
    record = RoutingRecord(tmp_path)
    for step in (1, 2, 4):
        record.write(step, batch(), ())
    check_replay(str(tmp_path), steps=2, layers=[])
    with pytest.raises(ConfigError, match="lacks the routing of step 3, .*training.steps=4"):
        check_replay(str(tmp_path), steps=4, layers=[])
    (tmp_path / "00000002.npz").write_bytes(b"cut")
    with pytest.raises(ConfigError, match="lacks the routing of steps 2 to 3"):
        check_replay(str(tmp_path), steps=4, layers=[])


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ([(2, 4)], "of 2 MoE layers, and this one has 1"),
        ([(2, 4), (1, 4)], "MoE layer 1 has 2 choices per token and here 1; set the router's k"),
        ([(2, 3), (2, 4)], "MoE layer 0 chooses expert 3 and has 3 experts here"),
    ],
)
def test_the_routing_of_another_model_is_refused_before_a_run_starts(tmp_path, layers, match):
    choices = np.zeros((ROWS, LENGTH, 2), np.int32)
    choices[0, 1] = [1, -4]  # the choice of expert 3 was dropped
    RoutingRecord(tmp_path).write(1, batch(), (choices, choices))
    check_replay(str(tmp_path), 1, [(2, 4), (2, 4)])
    with pytest.raises(ConfigError, match=match) as error:
        check_replay(str(tmp_path), 1, layers)
    assert "\n" not in str(error.value)


def test_a_record_of_other_width_is_refused():
    ones = np.ones((ROWS, LENGTH, 2), np.int32)
    with pytest.raises(ConfigError, match="2 choices per token, but Forced has k=1"):
        measure(routing.preset("forced", k=1), {**batch(), "routing": (ones, ones)})


def test_recording_changes_nothing():
    router = routing.preset("gshard")
    made = recipe(router)
    graph, state = made.create()
    results = []
    for record in (False, True):
        with jax.set_mesh(made.mesh):
            step = functools.partial(train_step, graph, made.optimizer, Objective(record=record))
            results.append(jax.jit(step)(state, batch())[0])
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"\x93NUMPY"])
def test_a_damaged_record_is_named(tmp_path, content):
    record, batch = RoutingRecord(tmp_path), {"inputs": np.zeros((2, 4), np.int32)}
    for step in (1, 2, 3, 4):
        record.write(step, batch, [np.zeros((2, 4, 1), np.int32)])
    assert record.missing(4) == []
    (tmp_path / "00000002.npz").write_bytes(content)
    (tmp_path / "00000003.npz").unlink()
    assert record.missing(4) == [2, 3]
    assert len(record.read(1, batch)) == 1
    with pytest.raises(ConfigError, match=r"00000002.npz is damaged .*: restore it") as error:
        record.read(2, batch)
    assert "\n" not in str(error.value)
