"""Quantised experts of whole models: which arrays change, what is measured, who gets more bits."""

import dataclasses

import numpy as np
import pytest

from moe_jax import models, routing
from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig
from moe_jax.surgery.mixture import mixtures, with_mixtures
from moe_jax.surgery.model_difference import compare
from moe_jax.surgery.quantise import (
    PrecisionChoice,
    activity_of,
    expert_matrices,
    output_errors,
    quantised,
    sizes,
    uniform,
    with_codes,
)
from tests.surgery.small import VOCAB, batch, config, weights
from tests.surgery.test_evidence import layer_inputs, silu

STREAM = [batch(0), batch(1)]


def quantised_model(found, precision, **settings):
    return with_codes(found, quantised(found, uniform(found, precision), **settings))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gated": False},
        {"expert_bias": True},
        {"latent_dim": 4, "shared_hidden": 6},
        {"scan_layers": True},
        {"expert_dims": (4, 8)},
        {"lookahead": 1},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_only_the_linear_maps_of_experts_change(changes):
    found = weights(_config(**changes))
    new = quantised_model(found, "int4", group=2)
    changed = {
        name for name, array in found.arrays.items() if not np.array_equal(array, new.arrays[name])
    }
    assert changed == {
        name
        for name in found.arrays
        if name.startswith("params/layers/") and "/feed_forward/experts/" in name
        if not name.endswith("_bias")
    }
    assert len(changed) == len(expert_matrices(found)) and new.module().config == found.model


def _config(**changes):
    fields = {f.name for f in dataclasses.fields(DecoderConfig)}
    own = {name: value for name, value in changes.items() if name in fields}
    if "expert_bias" in changes:
        own["mlp_bias"] = True
    inner = {n: v for n, v in changes.items() if n in ("latent_dim", "expert_dims")}
    if "shared_hidden" in changes:
        from moe_jax.nn.shared import SharedConfig

        inner["shared"] = SharedConfig(hidden=changes["shared_hidden"])
    return config(**own, **inner)


def test_the_activity_is_that_of_a_loop_over_tokens_and_experts():
    found = weights(config(num_layers=1, activation="silu"))
    (mixture,) = mixtures(found).values()
    sums, load = {"up": np.zeros((4, 8)), "down": np.zeros((4, 6))}, np.zeros((4, 1))
    for one in STREAM:
        inputs = np.asarray(layer_inputs(found, one)).reshape(-1, 8)
        chosen = np.argsort(-inputs @ np.asarray(mixture.router["kernel"], np.float64), 1)[:, :2]
        for x, experts in zip(inputs, chosen, strict=True):
            for e in experts:
                up, act = (np.asarray(mixture.experts[n][e]) for n in ("up", "gate"))
                sums["up"][e] += np.abs(x)
                sums["down"][e] += np.abs(silu(x @ act) * (x @ up))
                load[e] += 1
    got = activity_of(found, STREAM)
    for name, expected in (("up", sums["up"]), ("gate", sums["up"]), ("down", sums["down"])):
        activity = got[f"params/layers/0/feed_forward/experts/{name}"]
        np.testing.assert_allclose(activity, expected / np.maximum(load, 1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"latent_dim": 5}, {"expert_dims": (4, 8)}, {"scan_layers": True}, {"lookahead": 1}],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_every_expert_with_tokens_has_an_activity(changes):
    found = weights(_config(**changes))
    activity = activity_of(found, STREAM)
    assert {name: a.shape for name, a in activity.items()} == {
        matrix.name: matrix.shape[:2] for matrix in expert_matrices(found)
    }
    assert all(array.any() for array in activity.values())


def test_the_error_of_an_expert_is_the_change_of_its_weighted_output():
    # Output weights of expert 1 that are halved lose half of its output, so a quarter of its share
    # of the squared outputs; other experts lose nothing.
    found = weights(config())
    changed = {}
    for name, mixture in mixtures(found).items():
        down = mixture.experts["down"]
        experts = {**mixture.experts, "down": down.at[1].multiply(0.5)}
        changed[name] = dataclasses.replace(mixture, experts=experts)
    halved = with_mixtures(found, changed)
    silent = with_mixtures(
        found,
        {
            name: dataclasses.replace(m, experts={**m.experts, "down": 0 * m.experts["down"]})
            for name, m in mixtures(found).items()
        },
    )
    errors, energies = output_errors(found, [halved, silent], STREAM)
    for name, error in errors.items():
        assert energies[name].sum() == pytest.approx(1)
        np.testing.assert_allclose(error, [0, energies[name][1] / 4, 0, 0], rtol=1e-4, atol=1e-9)


def test_the_largest_gains_per_byte_get_more_bits_within_the_budget():
    # Low precision costs 4 * 10 bytes. Of the remaining 35 bytes, expert 2 of layer 1 takes 10,
    # expert 1 of layer 0 takes 20, and the other two do not fit.
    gain = {0: np.array([1.0, 4.0]), 1: np.array([0.0, 9.0])}
    low = {0: np.array([10.0, 10.0]), 1: np.array([10.0, 10.0])}
    high = {0: np.array([20.0, 30.0]), 1: np.array([20.0, 20.0])}
    choice = PrecisionChoice("int4", "int8", gain, low, high)
    assert choice.within(75) == {0: ("int4", "int8"), 1: ("int4", "int8")}
    assert choice.within(40) == {0: ("int4", "int4"), 1: ("int4", "int4")}
    # Expert 0 of layer 1 gains nothing, whatever the budget.
    assert choice.within(10**6) == {0: ("int8", "int8"), 1: ("int4", "int8")}
    with pytest.raises(ConfigError, match="budget=39 bytes is below the 40 bytes of int4"):
        choice.within(39)


@pytest.mark.parametrize("factors", [False, True])
def test_sizes_bound_the_file(factors):
    found = weights(config())
    activity = activity_of(found, STREAM) if factors else None
    for precision in ("int4", "int8", "fp8"):
        packed = quantised(found, uniform(found, precision), 2, activity)
        bound = sum(of.sum() for of in sizes(found, precision, 2, factors=factors).values())
        index = 6 * 4 * 4  # six arrays of four experts, each with an index of four bytes
        assert packed.size == bound and packed.size > index


def test_the_error_of_the_logits_falls_with_more_bits():
    found = weights(config())
    lengths = np.ones(VOCAB, np.int32)
    errors = [
        compare(found, quantised_model(found, precision), STREAM, lengths).logits_error
        for precision in ("int4", "fp8", "int8")
    ]
    assert errors[0] > 2 * errors[1] > 0 and errors[0] > 8 * errors[2] > 0
    same = compare(found, found, STREAM, lengths)
    assert same.logits_error == 0 and same.bits_per_byte[0] == same.bits_per_byte[1]


def test_bad_input_is_one_line():
    found = weights(config())
    with pytest.raises(ConfigError, match="group=4 does not divide the 6 input channels"):
        quantised(found, uniform(found, "int4"), 4)
    dense = models.DecoderConfig(num_layers=1, width=8, num_heads=2, head_dim=4, mlp_dim=12)
    with pytest.raises(ConfigError, match="no experts to quantise: upcycle it first"):
        expert_matrices(weights(dense))
    soft = config(routing.preset("soft_moe"), allow_future_leak=True)
    assert quantised_model(weights(soft), "int8").size == weights(soft).size
    with pytest.raises(ConfigError, match="take mixtures of all tokens"):
        activity_of(weights(soft), STREAM)
