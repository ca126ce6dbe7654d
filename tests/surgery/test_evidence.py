"""What experts do on a stream, and the loss without them."""

import dataclasses
import itertools

import numpy as np
import pytest

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.nn.mode import Mode
from moe_jax.surgery.api import _kept
from moe_jax.surgery.evidence import LeaveOneOut, loss_of, use_of
from moe_jax.surgery.mixture import mixtures
from moe_jax.surgery.prune import prune
from tests.surgery.small import batch, config, logits, weights

STREAM = [batch(0), batch(1)]


def silu(x):
    return x / (1 + np.exp(-x))


def reference(found, stream, gate_on="out"):
    """Load, gate, output and logits of the only layer, from its inputs, expert by expert."""
    (mixture,) = mixtures(found).values()
    sums = [np.zeros(4), np.zeros(4), np.zeros(4), np.zeros((4, 4))]
    for one in stream:
        inputs = np.asarray(layer_inputs(found, one)).reshape(-1, 8)
        scores = inputs @ np.asarray(mixture.router["kernel"], np.float64)
        chosen = np.argsort(-scores, axis=1)[:, :2]
        gates = np.exp(np.take_along_axis(scores, chosen, 1))
        gates /= gates.sum(1, keepdims=True)
        sums[3] += scores.T @ scores
        for x, experts, weights_ in zip(inputs, chosen, gates, strict=True):
            for e, gate in zip(experts, weights_, strict=True):
                up, down, act = (np.asarray(mixture.experts[n][e]) for n in ("up", "down", "gate"))
                read, factor = (x * gate, 1) if gate_on == "in" else (x, gate)
                y = (silu(read @ act) * (read @ up)) @ down
                sums[0][e] += 1
                sums[1][e] += gate
                sums[2][e] += factor * np.linalg.norm(y)
    return sums


def layer_inputs(found, one):
    """What the experts of the only layer read."""
    model, seen = found.module(), []
    block = next(iter(model.layers.layers())).block
    norm = type(block.feed_forward_norm)

    def watched(self, x, call=norm.__call__):
        seen.append((self, call(self, x)))
        return seen[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "__call__", watched)
        model.read(one, mode=Mode("full"))
    return seen[1][1]  # the norm of attention, then this one


@pytest.mark.parametrize("gate_on", ["out", "in"])
def test_use_is_that_of_a_loop_over_tokens_and_experts(gate_on):
    router = dataclasses.replace(routing.preset("mixtral"), gate_on=gate_on)
    found = weights(config(num_layers=1, activation="silu", router=router))
    (use,) = use_of(found, STREAM).values()
    expected = reference(found, STREAM, gate_on)
    for got, wanted in zip((use.load, use.gate, use.output, use.logits), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=1e-4)
    assert use.tokens == 2 * 16 == use.load.sum() / 2  # two choices of every token
    assert use.score("load").sum() == pytest.approx(1) == use.score("gate").sum()
    np.testing.assert_allclose(use.score("output"), use.output / use.load)


@pytest.mark.parametrize(
    "changes",
    [{"latent_dim": 5}, {"router_input": "residual"}, {"router": routing.preset("moe_plus_plus")}],
)
def test_use_is_that_of_the_choices_of_the_model(changes):
    found = weights(config(**changes))
    reports = found.module().read(STREAM[0], mode=Mode("full")).reports
    uses = use_of(found, STREAM[:1]).values()
    for use, report in zip(uses, reports, strict=True):
        np.testing.assert_array_equal(use.load, report.counts.load)


def test_the_loss_is_that_of_the_logits():
    found = weights(config())
    one = batch()
    logs = logits(found).astype(np.float64)
    logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
    wanted = -np.take_along_axis(logs, one["targets"][..., None], -1).mean()
    assert loss_of(found, [one]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "glm4_moe", "gemma4", "xmoe", "zaya", "noisy_top_k"])
def test_an_expert_without_logit_is_as_good_as_removed(name):
    choices = {} if name in ("xmoe", "zaya") else {"k": 2}
    found = weights(config(routing.preset(name, **choices)))
    left = LeaveOneOut(found, (batch(),))
    removed = {0: frozenset({1}), 1: frozenset({0, 3})}
    pruned = prune(found, {0: [0, 2, 3], 1: [1, 2]})
    assert left.without(removed) == pytest.approx(loss_of(pruned, [batch()]), rel=1e-5)
    assert left.without({}) == pytest.approx(loss_of(found, [batch()]), rel=1e-5)


def test_pruning_by_loss_leaves_out_the_expert_without_which_the_loss_is_lowest():
    found = weights(config(num_layers=1))
    losses = {}
    for expert in range(4):
        rest = [e for e in range(4) if e != expert]
        losses[expert] = loss_of(prune(found, {0: rest}), [batch()])
    cheapest = min(losses, key=losses.get)
    kept = _kept(found, iter([batch()]), 3, "loss", across=False)
    assert kept == {0: [e for e in range(4) if e != cheapest]}


def test_greedy_removal_takes_the_cheapest_expert_at_every_step():
    found = weights(config(num_layers=1))
    left = LeaveOneOut(found, (batch(),))
    removed = frozenset()
    for _ in range(2):
        options = [removed | {e} for e in range(4) if e not in removed]
        removed = min(options, key=lambda out: left.without({0: out}))
    assert left.greedy(2, {0: 2}) == {0: sorted(set(range(4)) - removed)}


def test_greedy_removal_leaves_equally_many_experts_in_each_group():
    found = weights(config(routing.preset("deepseek_v3", k=1, groups=2, keep_groups=1)))
    kept = LeaveOneOut(found, (batch(),)).greedy(2, {0: 2, 1: 2})
    assert all((of[0] < 2) and (of[1] >= 2) and len(of) == 2 for of in kept.values())


def test_greedy_removal_over_all_layers_respects_what_routers_need():
    found = weights(config())
    left = LeaveOneOut(found, (batch(),))
    kept = left.greedy(3, {0: 2, 1: 2}, across=True)
    assert sum(map(len, kept.values())) == 6 and min(map(len, kept.values())) >= 2
    pairs = itertools.combinations([(n, e) for n in (0, 1) for e in range(4)], 2)
    firsts = {one: left.without({one[0]: frozenset({one[1]})}) for pair in pairs for one in pair}
    cheapest = min(firsts, key=firsts.get)
    assert cheapest[1] not in kept[cheapest[0]]


def test_what_cannot_be_measured_is_one_line():
    soft = config(routing.preset("soft_moe"), allow_future_leak=True)
    with pytest.raises(ConfigError, match="take mixtures of all tokens"):
        use_of(weights(soft), STREAM)
    with pytest.raises(ConfigError, match="no batch: give a longer text"):
        use_of(weights(config()), [])


@pytest.mark.parametrize("by", ["load", "loss"])
def test_experts_that_choose_tokens_are_not_told_apart_by_their_load(by):
    router = routing.preset("expert_choice")
    found = weights(config(num_layers=1, router=router, allow_future_leak=True))
    with pytest.raises(ConfigError, match="choose tokens: .* by gate or output") as error:
        _kept(found, iter(STREAM), 2, by, False)
    assert "\n" not in str(error.value)
    (kept,) = _kept(found, iter(STREAM), 2, "output", False).values()
    (use,) = use_of(found, STREAM).values()
    assert len(set(use.load)) == 1
    assert sorted(kept) == sorted(np.argsort(-use.score("output"))[:2])


def sums(use):
    return use.load, use.gate, use.output


@pytest.mark.parametrize("router", ["fairseq_top2", "mixtral"])
def test_padding_is_no_evidence(router):
    # Routers of fairseq give padding slots of its own.
    found = weights(config(routing.preset(router), num_layers=1))
    padded = batch()
    padded["segments"] = padded["segments"].copy()
    padded["segments"][:, 5:] = 0
    (use,) = use_of(found, [padded]).values()
    assert use.tokens == 2 * 5
    assert use.load.sum() <= 2 * use.tokens
    if router == "fairseq_top2":
        other = {**padded, "inputs": padded["inputs"].copy()}
        other["inputs"][:, 5:] = 3
        (same,) = use_of(found, [other]).values()
        for one, two in zip(sums(use), sums(same), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
