"""Every preset against an independent reference; a new one without is named and refused.

References are the loops of ``published.py`` and ``references.py``, recorded outputs of the code a
paper cites, or records of ``transformers``. Draws are repeated from the key the router was given.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
from collections.abc import Callable
from types import ModuleType

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment, linprog

from moe_jax.routing import PRESETS, Plan, Router, preset
from moe_jax.routing.select.assigned import balanced_table
from moe_jax.routing.select.experts_choose import Cap
from tests.parity.compare import PRESETS as PARITY
from tests.routing import published, test_references

Array = np.ndarray
S, E = 24, 8
KEY = jax.random.key(7)


def built_by(module: ModuleType) -> set[str]:
    """Returns the presets that the tests of a module build by name."""
    nodes = ast.walk(ast.parse(inspect.getsource(module)))
    calls = (node for node in nodes if isinstance(node, ast.Call) and node.args)
    named = (call for call in calls if getattr(call.func, "id", "") == "preset")
    return {call.args[0].value for call in named if isinstance(call.args[0], ast.Constant)}


@functools.cache
def covered() -> set[str]:
    return built_by(inspect.getmodule(built_by)) | built_by(test_references)


@pytest.mark.parametrize("name", [function.__name__ for function in PRESETS])
def test_every_preset_has_a_reference(name: str):
    # Recordings do not count here: they are not everywhere.
    assert name in covered(), (
        f"nothing compares {name!r} with what it publishes: write the paper's loops into "
        f'published.py and a test of preset("{name}") here'
    )


@pytest.mark.parametrize("name", sorted({name for name, _ in PARITY.values()}))
def test_parity_is_with_presets(name: str):
    assert name in {function.__name__ for function in PRESETS}


@functools.cache
def compiled(router: Router, capacity: int):
    def call(logits, valid, key, ids, state):
        return router(logits, capacity=capacity, valid=valid, rng=key, token_ids=ids, state=state)

    return jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})


def run(router: Router, logits: Array, valid: Array, capacity: int = S, key=None, **given) -> Plan:
    logits = np.asarray(logits, np.float32)
    return compiled(router, capacity)(logits, valid, key, given.get("ids"), given.get("state"))


def weights(plan: Plan) -> Array:
    return np.asarray(plan.combine, np.float64).sum(-1)


def case(seed: int, padded: bool = True, shape: tuple[int, ...] = (S, E)) -> tuple[Array, Array]:
    logits = np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(np.float64)
    return logits, (np.arange(S) % 5 > 0) if padded else np.ones(S, bool)


def close(plan: Plan, expected: Array, losses: dict[str, float] | None = None) -> None:
    found = weights(plan)
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)
    for name, value in (losses or {}).items():
        np.testing.assert_allclose(plan.losses[name], value, rtol=5e-5, err_msg=name)


seeds = pytest.mark.parametrize("seed", [0, 1, 2])

# ---------------------------------------------------------------- softmax and the k best


@seeds
@pytest.mark.parametrize(
    ("router", "k", "normalize", "loss"),
    [
        (preset("mixtral"), 2, True, "all"),
        (preset("dbrx"), 4, True, "all"),
        (preset("gpt_oss"), 4, True, "all"),
        (preset("qwen3_moe", k=5), 5, True, "all"),
        (preset("qwen2_moe"), 4, False, "all"),
        (preset("olmoe", k=3), 3, False, "mean"),
        (preset("deepseek_moe"), 6, False, "mean"),
        (preset("jacobs_1991"), E, False, None),
    ],
)
def test_dropless_top_k(router: Router, k: int, normalize: bool, loss: str | None, seed: int):
    logits, valid = case(seed)
    assert router.slots(S, E, train=True) == S
    expected, losses = published.top_k(logits, valid, k, S, normalize)
    plan = run(router, logits, valid)
    close(plan, expected, {"balance": losses[loss]} if loss else None)
    if "z" in router.loss_weights:
        np.testing.assert_allclose(plan.losses["z"], losses["z"], rtol=1e-5)


@seeds
@pytest.mark.parametrize("k", [1, 2])
def test_switch_t5x(seed: int, k: int):
    # round(24 / 8 * 1.5) = 4 (ties to even: 4.5), where ceil would give 5; whatever k.
    router = preset("switch_t5x", capacity_factor=1.5, z_weight=1e-3, k=k)
    assert router.slots(S, E, train=True) == round(1.5 * S / E) == 4
    logits, valid = case(seed)
    expected, losses = published.top_k(logits, valid, k, 2)
    # Padding is zeroed in both factors of the balance, and counts in the divisors of both.
    balance = losses["all"] * valid.mean() ** 2
    wanted = {"balance": balance, "z": published.z_loss(logits, valid, zeroed=True)}
    close(run(router, logits, valid, 2), expected, wanted)


@seeds
@pytest.mark.parametrize("capacity", [1, 2])
def test_no_token_left_behind(seed: int, capacity: int):
    logits, valid = case(seed)
    expected, losses = published.no_token_left_behind(logits, valid, 4, capacity)
    close(run(preset("no_token_left_behind"), logits, valid, capacity), expected, losses)


@seeds
def test_glam_keeps_both_experts_in_training(seed: int):
    logits, valid = case(seed)
    expected, losses = published.top_k(logits, valid, 2, 4, normalize=True)
    close(run(preset("glam"), logits, valid, 4, KEY), expected, {"balance": losses["first"]})


@seeds
@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_models_without_slots_given_some(name: str, seed: int):
    # The factor is per choice: ceil(24 * 2 * 1 / 8) = 6, of which two are full at least.
    router = preset(name, k=2, capacity_factor=1.0)
    assert router.slots(S, E, train=True) == 6
    logits, valid = case(seed)
    logits[:, :2] += 1
    expected, _ = published.top_k(logits, valid, 2, 6, normalize=name == "mixtral")
    plan = run(router, logits, valid, 6)
    close(plan, expected)
    assert plan.counts.dropped > 0


@seeds
def test_st_moe(seed: int):
    # Appendix G: the second expert is kept where its gate exceeds 0.2 of a uniform draw.
    logits, valid = case(seed)
    logits *= 3
    uniform = np.asarray(jax.random.uniform(KEY, (S,), np.float32))
    chosen = [published.ranked(published.softmax(row), 2) for row in logits]
    choices = []
    for token, (e1, e2) in enumerate(chosen):
        p = published.softmax(logits[token])
        g1, g2 = p[e1] / (p[e1] + p[e2]), p[e2] / (p[e1] + p[e2])
        kept = g2 if g2 > 0.2 * uniform[token] else None
        choices.append([(e1, g1), (e2, kept)] if valid[token] else [])
    plan = run(preset("st_moe"), logits, valid, 4, KEY)
    _, losses = published.top_k(logits, valid, 2, S)
    wanted = {"balance": losses["first"], "z": losses["z"]}
    close(plan, published.seat(choices, E, 4), wanted)
    lost = sum(gate is None for row in choices for _, gate in row)
    assert lost > 0


# ---------------------------------------------------------------- fairseq


@seeds
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("second", ["all", "random", "sampling"])
def test_fairseq_top2(second: str, before: bool, seed: int):
    router = preset("fairseq_top2", second=second, normalize_before_dropping=before, pad_mask=True)
    logits, valid = case(seed)
    capacity = 2 * math.ceil(S / E)
    assert router.slots(S, E, train=True) == capacity
    assert router.slots(S, E, train=False) == math.ceil(0.25 * S)
    uniform = np.asarray(jax.random.uniform(KEY, (S,), np.float32))
    gumbel = np.asarray(jax.random.gumbel(KEY, (S, E), np.float32))
    draws = {"random": {"uniform": uniform}, "sampling": {"gumbel": gumbel}}.get(second, {})
    expected, losses = published.fairseq_top2(logits, valid, capacity // 2, before=before, **draws)
    close(run(router, logits, valid, capacity // 2, KEY), expected, losses)


@seeds
@pytest.mark.parametrize(("pad_mask", "prioritized"), [(False, False), (True, True)])
def test_fairseq_top2_padding_and_priority(pad_mask: bool, prioritized: bool, seed: int):
    router = preset("fairseq_top2", second="all", pad_mask=pad_mask, batch_prioritized=prioritized)
    logits, valid = case(seed)
    expected, losses = published.fairseq_top2(
        logits, valid, 3, pad_mask=pad_mask, prioritized=prioritized
    )
    close(run(router, logits, valid, 3), expected, losses)


def test_fairseq_samples_the_second_expert_from_the_softmax():
    # Gumbel noise on the logits, then the best but the first: expert e with probability
    # p_e / (1 - p_first); five binomial deviations.
    tokens, row = 4096, np.array([2.0, 0.5, 1.0, -1.0, 0.0])
    logits = np.tile(row, (tokens, 1))
    router = preset("fairseq_top2", second="sampling")
    plan = run(router, logits, np.ones(tokens, bool), tokens, KEY)
    load, p = np.asarray(plan.counts.load), published.softmax(row)
    assert load[0] == tokens and load.sum() == 2 * tokens
    for e in range(1, 5):
        share = p[e] / (1 - p[0])
        assert abs(load[e] - tokens * share) < 5 * math.sqrt(tokens * share * (1 - share))


@seeds
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("pad_mask", [False, True])
def test_fairseq_top1(pad_mask: bool, prioritized: bool, seed: int):
    router = preset("fairseq_top1", pad_mask=pad_mask, batch_prioritized=prioritized)
    assert router.slots(21, E, train=True) == int(1.0 * math.ceil(21 / E)) == 3
    assert router.slots(21, E, train=False) == math.ceil(0.25 * 21) == 6
    logits, valid = case(seed)
    present = valid if pad_mask else np.ones(S, bool)
    gates = [published.softmax(row) for row in logits]
    first = [published.ranked(p, 1)[0] for p in gates]
    choices = [[(first[t], gates[t][first[t]])] if present[t] else [] for t in range(S)]
    order = sorted(range(S), key=lambda t: -max(gates[t])) if prioritized else None
    # Its loss reads first choices alone, as that of the top-2 gate.
    _, losses = published.fairseq_top2(logits, valid, 3, pad_mask=pad_mask)
    close(run(router, logits, valid, 3), published.seat(choices, E, 3, order), losses)


@seeds
def test_xmoe(seed: int):
    # Tokens meet unit embeddings in few dimensions; then fairseq's gate, normalised before.
    rng = np.random.default_rng(seed)
    x, projection = rng.normal(size=(S, 12)), rng.normal(size=(12, 4))
    embedding = rng.normal(size=(E, 4))
    logits = np.zeros((S, E))
    for token in range(S):
        low = [sum(x[token, m] * projection[m, d] for m in range(12)) for d in range(4)]
        for expert in range(E):
            norm = math.sqrt(sum(v * v for v in embedding[expert]))
            logits[token, expert] = (
                sum(a * b for a, b in zip(low, embedding[expert], strict=True)) / norm
            )
    router = preset("xmoe", dim=4)
    parameters = {"projection": projection, "embedding": embedding}
    parameters = {name: np.asarray(value, np.float32) for name, value in parameters.items()}
    found = router.head.logits(jax.numpy.asarray(x, np.float32), parameters, E)
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)
    uniform = np.asarray(jax.random.uniform(KEY, (S,), np.float32))
    valid = np.arange(S) % 5 > 0
    expected, losses = published.fairseq_top2(logits, valid, 4, uniform=uniform, before=True)
    close(run(router, logits, valid, 4, KEY), expected, losses)


# ---------------------------------------------------------------- noise


@seeds
@pytest.mark.parametrize("priority", ["score", "choice"])
def test_vmoe(priority: str, seed: int):
    logits, valid = case(seed)
    key = jax.random.fold_in(KEY, 1)
    draws = np.asarray(jax.random.normal(key, (S, E), np.float32), np.float64)
    noisy = logits + draws / E
    prioritized = priority == "score"
    expected, losses = published.vmoe(logits, noisy, valid, 2, 4, 1 / E, prioritized)
    close(run(preset("vmoe", priority=priority), logits, valid, 4, KEY), expected, losses)
    without, _ = published.vmoe(logits, logits, valid, 2, 4, 1 / E, prioritized)
    close(run(preset("vmoe", priority=priority), logits, valid, 4), without)
    # ceil(24 * 2 * 1.05 / 8) = 7, to a multiple of 4.
    assert preset("vmoe").slots(S, E, train=True) == 8


@seeds
def test_noisy_top_k(seed: int):
    planes, valid = case(seed, shape=(S, E, 2))
    key = jax.random.fold_in(KEY, 1)
    draws = np.asarray(jax.random.normal(key, (S, E), np.float32), np.float64)
    deviation = np.log1p(np.exp(planes[..., 1]))
    expected, losses = published.noisy_top_k(planes[..., 0], deviation, draws, valid, 3)
    close(run(preset("noisy_top_k", k=3), planes, valid, S, KEY), expected, losses)
    without, _ = published.top_k(planes[..., 0], valid, 3, S, normalize=True)
    close(run(preset("noisy_top_k", k=3), planes, valid, S), without)


# ---------------------------------------------------------------- DeepSeek and Llama


@seeds
@pytest.mark.parametrize("train", [True, False])
def test_deepseek_v2(train: bool, seed: int):
    logits, valid = case(seed)
    logits[:, :2] += 1  # a popular device
    router = preset("deepseek_v2", k=3, devices=4, keep_devices=2)
    expected, losses = published.deepseek_v2(logits, valid, 3, 4, 2, 16.0, drop=train)
    plan = run(router, logits, valid, S, KEY if train else None)
    close(plan, expected, losses)
    assert (float(plan.counts.dropped) > 0) == train


@seeds
def test_deepseek_moe_device_loss(seed: int):
    logits, valid = case(seed)
    _, losses = published.deepseek_v2(logits, valid, 6, 4, 4, 1.0, drop=False)
    plan = run(preset("deepseek_moe", device_weight=0.05, devices=4), logits, valid)
    np.testing.assert_allclose(plan.losses["device_balance"], losses["device_balance"], rtol=1e-5)
    np.testing.assert_allclose(plan.losses["balance"], losses["balance"], rtol=1e-5)


@seeds
def test_deepseek_v3(seed: int):
    logits, valid = case(seed)
    bias = np.random.default_rng(seed).normal(size=E).astype(np.float32) / 4
    router = preset("deepseek_v3", k=3, groups=4, keep_groups=2)
    expected, losses = published.deepseek_v3(logits, bias, valid, 3, 4, 2, 2.5)
    close(run(router, logits, valid, state={"bias": bias}), expected, losses)


@seeds
@pytest.mark.parametrize(
    ("router", "scale", "score"),
    [
        (preset("glm4_moe", k=3), 1.0, published.sigmoids),
        (preset("kimi_k2", k=3), 2.827, published.sigmoids),
        (preset("minimax_m2", k=3), 1.0, published.sigmoids),
        (preset("deepseek_v4", k=3), 1.5, published.root_softplus),
    ],
)
def test_descendants_of_deepseek_v3_have_no_groups(
    router: Router, scale: float, score: Callable, seed: int
):
    logits, valid = case(seed)
    bias = np.random.default_rng(seed).normal(size=E).astype(np.float32) / 4
    expected, losses = published.deepseek_v3(logits, bias, valid, 3, 1, 1, scale, score)
    close(run(router, logits, valid, state={"bias": bias}), expected, losses)


@seeds
def test_ernie4_5_moe(seed: int):
    # A biased choice among the softmax, whose loss counts all choices: k times DeepSeek's.
    logits, valid = case(seed)
    bias = np.random.default_rng(seed).normal(size=E).astype(np.float32) / 8
    softmax = published.softmax
    expected, losses = published.deepseek_v3(logits, bias, valid, 3, 1, 1, 1.0, softmax)
    plan = run(preset("ernie4_5_moe", k=3), logits, valid, state={"bias": bias})
    close(plan, expected, {"balance": 3 * losses["balance"]})


@seeds
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_cohere2_moe(gate: str, seed: int):
    # The best logits first, then a softmax over these alone, or their sigmoids over their sum.
    logits, valid = case(seed)
    expected = np.zeros((S, E))
    for token in np.flatnonzero(valid):
        best = published.ranked(list(logits[token]), 2)
        chosen = {"softmax": np.exp, "sigmoid": lambda x: 1 / (1 + np.exp(-x))}[gate](
            logits[token, best]
        )
        expected[token, best] = chosen / chosen.sum()
    close(run(preset("cohere2_moe", gate=gate), logits, valid), expected)


@seeds
@pytest.mark.parametrize("from_file", [False, True])
def test_deepseek_v4_hash(from_file: bool, seed: int, tmp_path):
    # The experts of an id are fixed; the gates are scores of the token over their sum, times 1.5.
    ids, (logits, valid) = np.random.default_rng(seed).integers(0, 50, S), case(seed)
    if from_file:
        table = np.stack([np.random.default_rng(i).permutation(E)[:3] for i in range(50)])
        np.save(tmp_path / f"{seed}.npy", table)
        router = preset("deepseek_v4_hash", k=3, table=str(tmp_path / f"{seed}.npy"))
    else:
        # MurmurHash3's finaliser of id * E + expert, in Python's integers; the largest 24 bits win.
        values = [[murmur(i * E + e) >> 8 for e in range(E)] for i in range(50)]
        table = np.array([published.ranked(row, 3) for row in values])
        router = preset("deepseek_v4_hash", k=3)
    expected = np.zeros((S, E))
    for token in np.flatnonzero(valid):
        scores = published.root_softplus(logits[token])
        total = sum(scores[e] for e in table[ids[token]])
        for e in table[ids[token]]:
            expected[token, e] = 1.5 * scores[e] / total
    close(run(router, logits, valid, ids=ids.astype(np.int32)), expected)


def murmur(h: int) -> int:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ h >> shift) * factor & 0xFFFFFFFF
    return h ^ h >> 16


def test_deepseek_v3_moves_its_bias():
    # After each of six steps, gamma down for overloaded experts and up for the others.
    router = preset("deepseek_v3", k=3, groups=4, keep_groups=2, bias_rate=0.05)
    bias, state = np.zeros(E), {"bias": np.zeros(E, np.float32)}
    for step in range(6):
        logits, valid = case(step)
        logits[:, 0] += 1.5  # a popular expert
        expected, losses = published.deepseek_v3(logits, bias, valid, 3, 4, 2, 2.5)
        plan = run(router, logits, valid, state=state)
        close(plan, expected, losses)
        load = (expected > 0).sum(0)
        for e in range(E):
            if load[e] != load.mean():
                bias[e] += -0.05 if load[e] > load.mean() else 0.05
        state = router.next_state(state, plan.counts.demand)
        np.testing.assert_allclose(state["bias"], bias, rtol=1e-5, atol=1e-7)
    assert bias[0] < -0.1


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_loss_free(rule: str):
    # Algorithm 1 over five batches: choose by s + b, gate by s, then move b by the loads.
    router = preset("loss_free", k=2, bias_rate=0.05, rule=rule)
    bias, state = [0.0] * E, {"bias": np.zeros(E, np.float32)}
    for seed in range(5):
        logits, valid = case(seed)
        logits[:, 0] += 1  # a popular expert
        expected = np.zeros((S, E))
        for token in range(S):
            s = [1 / (1 + math.exp(-v)) for v in logits[token]]
            for e in published.ranked([a + b for a, b in zip(s, bias, strict=True)], 2):
                expected[token, e] = s[e] * valid[token]
        plan = run(router, logits, valid, state=state)
        close(plan, expected)
        load = (expected > 0).sum(0)
        for e in range(E):
            error = load.mean() - load[e]
            bias[e] += 0.05 * (np.sign(error) if rule == "sign" else error / load.mean())
        state = router.next_state(state, plan.counts.demand)
        np.testing.assert_allclose(state["bias"], bias, rtol=1e-4, atol=1e-6)
    assert bias[0] < -0.1


@seeds
def test_moe_plus_plus(seed: int):
    # A softmax over 8 experts, 2 constants, a copy and a zero; the two best, as they are.
    logits, valid = case(seed, shape=(S, E + 4))
    expected, _ = published.top_k(logits, valid, 2, S)
    plan = run(preset("moe_plus_plus"), logits, valid)
    close(plan, expected[:, :E])
    np.testing.assert_allclose(plan.free, expected[:, E:], rtol=2e-5, atol=1e-7)
    # Equation 8: the sum of tau f P, with tau = 0.75 for the four free experts.
    scores = [published.softmax(row) for row in logits]
    loss = 0.0
    for e in range(E + 4):
        f = sum(expected[t, e] > 0 for t in range(S)) / valid.sum()
        mean = sum(scores[t][e] for t in range(S) if valid[t]) / valid.sum()
        loss += (1.0 if e < E else 0.75) * f * mean
    np.testing.assert_allclose(plan.losses["balance"], loss, rtol=1e-5)


@seeds
def test_longcat_flash(seed: int):
    # The k best of softmax + bias among 8 experts and 4 copies; the gates are 6 times the softmax.
    logits, valid = case(seed, shape=(S, E + 4))
    bias = np.random.default_rng(seed).normal(size=E + 4).astype(np.float32) / 8
    router = preset("longcat_flash", k=3, copy=4, compute=2 / 3, bias_rate=0.1)
    expected = np.zeros((S, E + 4))
    for token in np.flatnonzero(valid):
        p = published.softmax(logits[token])
        for e in published.ranked([a + b for a, b in zip(p, bias, strict=True)], 3):
            expected[token, e] = 6 * p[e]
    plan = run(router, logits, valid, state={"bias": bias})
    close(plan, expected[:, :E])
    np.testing.assert_allclose(plan.free, expected[:, E:], rtol=2e-5, atol=1e-7)
    # mu * (K_e / (K N) - T_i / (K T)) for the N = 8 experts that compute.
    after = router.next_state({"bias": bias}, plan.counts.demand, plan.counts.observed)["bias"]
    for e in range(E):
        share = (expected[:, e] > 0).sum() / (3 * valid.sum())
        np.testing.assert_allclose(after[e], bias[e] + 0.1 * (2 / 24 - share), rtol=1e-4)
    np.testing.assert_array_equal(after[E:], bias[E:])


@seeds
def test_gemma4(seed: int):
    # A softmax, the best three over their sum, each times the scale of its expert.
    planes, valid = case(seed, shape=(S, E, 2))
    planes[..., 1] = np.abs(planes[0, :, 1])
    expected, losses = published.top_k(planes[..., 0], valid, 3, S, normalize=True)
    plan = run(preset("gemma4", k=3), planes, valid)
    close(plan, expected * planes[0, :, 1], {"balance": losses["all"]})


@seeds
def test_zaya(seed: int):
    # The best of softmax + bias, with a constant -0.1 for the ninth, which skips the layer.
    logits, valid = case(seed, shape=(S, E + 1))
    bias = np.random.default_rng(seed).normal(size=E + 1).astype(np.float32) / 16
    bias[-1] = 0
    expected = np.zeros((S, E + 1))
    for token in np.flatnonzero(valid):
        p = published.softmax(logits[token])
        e = published.ranked([p[e] + bias[e] - 0.1 * (e == E) for e in range(E + 1)], 1)[0]
        expected[token, e] = p[e]
    plan = run(preset("zaya", offset=-0.1), logits, valid, state={"bias": bias})
    close(plan, expected[:, :E])
    np.testing.assert_allclose(plan.free, expected[:, E:], rtol=2e-5, atol=1e-7)


@seeds
def test_phimoe(seed: int):
    # In evaluation: the best expert, its gate over all within 2 * 0.2 of it; then without it.
    logits, valid = case(seed)
    expected = np.zeros((S, E))
    for token in np.flatnonzero(valid):
        left = list(range(E))
        for _ in range(2):
            top = max(logits[token, e] for e in left)
            near = [
                e for e in left if (top - logits[token, e]) / max(abs(logits[token, e]), top) <= 0.4
            ]
            best = max(left, key=lambda e: logits[token, e])
            total = sum(math.exp(logits[token, e]) for e in near)
            expected[token, best] = math.exp(logits[token, best]) / total
            left.remove(best)
    _, losses = published.top_k(logits, valid, 2, S)
    close(run(preset("phimoe", jitter=0.2), logits, valid), expected, {"balance": losses["all"]})


@seeds
@pytest.mark.parametrize("rounding", ["nearest", "up", "down"])
def test_token_rounding(rounding: str, seed: int):
    # SonicMoE's benchmark: the top 2; per expert its tokens by their normalised gates, then all
    # others by score minus 1; the first multiple of the tile. The gates are the softmax.
    logits, valid = case(seed)
    scores = np.array([published.softmax(row) for row in logits])
    order = np.full((S, E), -np.inf)
    load = [0] * E
    for token in np.flatnonzero(valid):
        top = published.ranked(list(scores[token]), 2)
        order[token] = scores[token] - 1
        for e in top:
            order[token, e] = scores[token, e] / scores[token, top].sum()
            load[e] += 1
    expected = np.zeros((S, E))
    turn = {"nearest": round, "up": math.ceil, "down": math.floor}[rounding]
    for e in range(E):
        number = min(turn(load[e] / 4) * 4, int(valid.sum()))
        for token in published.ranked(list(order[:, e]), number):
            expected[token, e] = scores[token, e]
    router = preset("token_rounding", k=2, tile=4, rounding=rounding)
    close(run(router, logits, valid, key=KEY), expected)
    plain, _ = published.top_k(logits, valid, 2, S)
    close(run(router, logits, valid), plain)


@seeds
def test_remoe(seed: int):
    # ReLU gates, all of the positive ones; lambda 1.2^3 times the mean of sum_e f_e g_e, where
    # f_e = E / (k T) times the tokens with a positive gate. Lambda grows if there are too many.
    logits, valid = case(seed)
    expected = np.maximum(logits, 0) * valid[:, None]
    router, state = preset("remoe", k=2), {"sparsity_steps": np.full(1, 3, np.float32)}
    loss = 0.0
    for e in range(E):
        f = E / (2 * valid.sum()) * (expected[:, e] > 0).sum()
        loss += f * expected[:, e].sum() / valid.sum()
    plan = run(router, logits, valid, state=state)
    close(plan, expected, {"sparsity": 1.2**3 * loss})
    sparsity = 1 - (expected > 0).sum() / (valid.sum() * E)
    after = router.next_state(state, plan.counts.demand, plan.counts.observed)
    np.testing.assert_array_equal(after["sparsity_steps"], [3 + np.sign(1 - 2 / E - sparsity)])


@seeds
def test_expert_threshold(seed: int):
    # s > c routes; c moves by a tenth to the value at which expert choice cuts k T / E tokens.
    logits, valid = case(seed, padded=False)
    cut = np.random.default_rng(seed).normal(size=E).astype(np.float32) / 4
    router, state = preset("expert_threshold", k=2, decay=0.9), {"threshold": cut}
    expected = np.zeros((S, E))
    for token in range(S):
        for e, s in enumerate(published.sigmoids(logits[token])):
            if logits[token, e] > cut[e]:
                expected[token, e] = s
    plan = run(router, logits, valid, state=state)
    close(plan, expected)
    after = router.next_state(state, plan.counts.demand, plan.counts.observed)["threshold"]
    for e in range(E):
        ordered = sorted(logits[:, e], reverse=True)
        low, high = ordered[S * 2 // E], ordered[S * 2 // E - 1]
        slack = 0.2 * abs(low - cut[e]) + 1e-3
        assert low - slack <= cut[e] + 10 * (after[e] - cut[e]) <= high + slack


@seeds
def test_quantile_balancing(seed: int):
    # Megatron-LM: route by s - beta; then beta is the (T K / E + 1)-th largest of s - alpha, where
    # alpha is a token's (K + 1)-th best s - beta. With 24 tokens the histogram may fall between the
    # two margins on either side of the quantile.
    logits, valid = case(seed, padded=False)
    beta = np.random.default_rng(seed).normal(size=E).astype(np.float32) / 8
    scores = np.array([published.sigmoids(row) for row in logits])
    expected, margins = np.zeros((S, E)), np.zeros((S, E))
    for token in range(S):
        order = published.ranked(list(scores[token] - beta), 3)
        total = sum(scores[token, e] for e in order[:2])
        for e in order[:2]:
            expected[token, e] = scores[token, e] / total
        margins[token] = scores[token] - (scores[token] - beta)[order[2]]
    router, state = preset("quantile_balancing", k=2), {"bias": -beta}
    plan = run(router, logits, valid, state=state)
    close(plan, expected)
    after = router.next_state(state, plan.counts.demand, plan.counts.observed)["bias"]
    for e in range(E):
        ordered = sorted(margins[:, e], reverse=True)
        low, high = ordered[S * 2 // E], ordered[S * 2 // E - 1]
        slack = 0.2 * abs(low - beta[e]) + 1e-3
        assert low - slack <= -after[e] <= high + slack


def test_pi_balancing():
    # Choose by s + b over five batches; then the integral of the errors and the last error.
    router = preset("pi_balancing", k=2, bias_rate=0.05, bias_gain=0.1)
    integral, bias = [0.0] * E, [0.0] * E
    state = {"bias": np.zeros(E, np.float32), "integral": np.zeros(E, np.float32)}
    for seed in range(5):
        logits, valid = case(seed)
        logits[:, 0] += 1  # a popular expert
        expected, _ = published.deepseek_v3(logits, np.array(bias), valid, 2, 1, 1, 1.0)
        plan = run(router, logits, valid, state=state)
        close(plan, expected)
        load = (expected > 0).sum(0)
        for e in range(E):
            error = (load.mean() - load[e]) / load.mean()
            integral[e] += 0.05 * error
            bias[e] = integral[e] + 0.1 * error
        state = router.next_state(state, plan.counts.demand)
        np.testing.assert_allclose(state["bias"], bias, rtol=1e-4, atol=1e-6)
    assert bias[0] < -0.1


@seeds
def test_llama4(seed: int):
    logits, valid = case(seed)
    expected = np.zeros((S, E))
    for token in range(S):
        e = published.ranked(list(logits[token]), 1)[0]
        expected[token, e] = valid[token] / (1 + math.exp(-logits[token, e]))
    # Its training loss is not published; ours is DeepSeek-V3's, whose groups do not matter to it
    # if all are kept.
    _, losses = published.deepseek_v3(logits, np.zeros(E), valid, 1, 4, 4, 1.0)
    close(run(preset("llama4"), logits, valid), expected, losses)
    assert preset("llama4").gate_on == "in"


# ---------------------------------------------------------------- assigned


@seeds
@pytest.mark.parametrize("padded", [False, True])
def test_base(padded: bool, seed: int):
    # The auction against the exact assignment to S / E copies of each expert; its total may fall
    # short by S times the tolerance of 1e-3 of the range of the logits.
    logits, valid = case(seed, padded)
    logits[:, 0] += 2  # most would rather go there
    plan = run(preset("base"), logits, valid, S // E, KEY)
    chosen = np.asarray(plan.dispatch).sum(-1)
    np.testing.assert_array_equal(chosen.sum(1), valid)
    assert chosen.sum(0).max() == S // E and (padded or chosen.sum(0).min() == S // E)
    real = np.flatnonzero(valid)
    rows, columns = linear_sum_assignment(-np.repeat(logits[real], S // E, axis=1))
    best = sum(logits[real[t], c // (S // E)] for t, c in zip(rows, columns, strict=True))
    assert best - S * 1e-3 * np.ptp(logits) <= (chosen * logits).sum() <= best + 1e-4
    gate = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(weights(plan), chosen * gate, rtol=1e-5)
    greedy = run(preset("base"), logits, valid, S)
    expected = (logits == logits.max(1, keepdims=True)) * gate * valid[:, None]
    close(greedy, expected)


@seeds
def test_sinkhorn(seed: int):
    logits, valid = case(seed)
    plan = published.sinkhorn(logits, valid, 30)
    expected = np.zeros((S, E))
    for token in np.flatnonzero(valid):
        e = published.ranked(list(plan[token]), 1)[0]
        expected[token, e] = published.softmax(logits[token])[e]
    close(run(preset("sinkhorn"), logits, valid, S, KEY), expected)
    tested, _ = published.top_k(logits, valid, 1, S)
    close(run(preset("sinkhorn"), logits, valid), tested)


@pytest.mark.parametrize("kind", ["modulo", "balanced", "random"])
def test_hash(kind: str):
    ids = np.random.default_rng(0).integers(0, 64, S)
    valid = np.arange(S) % 5 > 0
    plan = run(preset("hash", kind=kind, vocab_size=64), np.zeros((S, E)), valid, ids=ids)
    chosen = weights(plan).argmax(1)
    if kind == "modulo":
        expert = ids % E
    elif kind == "balanced":
        # Greedy over ids by falling Zipf frequency, each to the lightest expert.
        load, table = [0.0] * E, []
        for rank in range(64):
            table.append(load.index(min(load)))
            load[table[-1]] += 1 / (rank + 1)
        np.testing.assert_array_equal(balanced_table(64, E), table)
        expert = np.array(table)[ids]
    else:
        expert = chosen
        # The same id always goes to the same expert, and many ids spread over all.
        assert all(len(set(chosen[valid & (ids == i)])) <= 1 for i in set(ids))
        many = run(
            preset("hash", kind=kind),
            np.zeros((4096, E)),
            np.ones(4096, bool),
            4096,
            ids=np.arange(4096),
        )
        # 512 expected each with a deviation of 21: five of them.
        assert np.abs(np.asarray(many.counts.load) - 512).max() < 106
    expected = np.eye(E)[expert] * valid[:, None]
    np.testing.assert_array_equal(weights(plan), expected)


def test_random():
    # Uniform over pairs: each expert is in a quarter of them; five binomial deviations.
    tokens, k = 512, 2
    plan = run(preset("random", k=k), np.zeros((tokens, E)), np.ones(tokens, bool), tokens, KEY)
    load, share = np.asarray(plan.counts.load), k / E
    assert np.abs(load - tokens * share).max() < 5 * math.sqrt(tokens * share * (1 - share))
    assert set(np.unique(weights(plan))) == {0.0, 0.5}
    in_turn = run(preset("random", k=k), np.zeros((S, E)), np.ones(S, bool))
    np.testing.assert_array_equal(in_turn.counts.load, [S * k // E] * E)


@seeds
def test_forced(seed: int):
    logits, valid = case(seed)
    record = np.random.default_rng(seed).integers(-E, E, (S, 2)).astype(np.int32)
    record[:, 1] = np.where(record[:, 0] == record[:, 1], ~record[:, 1], record[:, 1])
    expected = np.zeros((S, E))
    for token in np.flatnonzero(valid):
        p = published.softmax(logits[token])
        experts = [e if e >= 0 else -1 - e for e in record[token]]
        for e, raw in zip(experts, record[token], strict=True):
            if raw >= 0:
                expected[token, e] = p[e] / sum(p[i] for i in experts)
    router = preset("forced", k=2, normalize=True)
    close(run(router, logits, valid, state={"experts": record}), expected)


# ---------------------------------------------------------------- the others


@seeds
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_expert_choice(factor: float, seed: int):
    router = preset("expert_choice", capacity_factor=factor)
    capacity = router.slots(S, E, train=True)
    assert capacity == int(S * factor / E)
    logits, valid = case(seed)
    expected = np.zeros((S, E))
    for e in range(E):
        column = [published.softmax(logits[t])[e] if valid[t] else -1.0 for t in range(S)]
        for token in published.ranked(column, capacity):
            expected[token, e] = column[token]
    close(run(router, logits, valid, capacity), expected)


@pytest.mark.parametrize("bound", [2, 3])
def test_expert_choice_capped(bound: int):
    # The entropic program by plain projections in float64 on the paper's three sets, at an entropy
    # where these converge.
    logits, valid = case(4)
    capacity, entropy = 4, 0.1
    scores = np.array([published.softmax(row) for row in logits])
    scores[:, 0] += 0.3  # one expert wants what others want
    plan = np.exp(scores / entropy) * valid[:, None]
    rest_token, rest_box = np.ones((S, 1)), np.ones((S, E))
    for _ in range(3000):
        plan = plan * capacity / plan.sum(0)
        given = plan * rest_token
        over = np.maximum(given.sum(1, keepdims=True) / bound, 1)
        plan, rest_token = given / over, over
        given = plan * rest_box
        plan = np.minimum(given, 1)
        rest_box = given / np.where(plan > 0, plan, 1)
        rest_box[plan == 0] = 1
    found = np.exp(Cap(bound, entropy, 300)(scores.astype(np.float32), valid, capacity))
    np.testing.assert_allclose(found, plan, rtol=1e-3, atol=1e-4)
    router = preset("expert_choice_capped", experts_per_token=bound)
    assert router.select.cap == Cap(bound, 1e-3, 100)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("factor", "bound"), [(0.5, 1), (1.0, 2), (2.0, 3)])
def test_expert_choice_capped_is_the_linear_program(factor: float, bound: int, seed: int):
    # At the paper's entropy of 0.001 the program is nearly linear, and the vertices of a linear
    # one are 0 and 1: the solver of scipy finds them.
    router = preset("expert_choice_capped", capacity_factor=factor, experts_per_token=bound)
    capacity = router.slots(S, E, train=True)
    logits, valid = case(seed)
    logits[:, 0] += 1
    scores = np.array([published.softmax(row) for row in logits])
    of_expert, of_token = np.tile(np.eye(E), S), np.repeat(np.eye(S), E, axis=1)
    solved = linprog(
        -scores.reshape(-1),
        A_ub=of_token,
        b_ub=np.full(S, bound),
        A_eq=of_expert,
        b_eq=np.full(E, capacity),
        bounds=[(0, float(real)) for real in np.repeat(valid, E)],
    )
    exact = solved.x.reshape(S, E).round()
    plan = run(router, logits, valid, capacity)
    chosen = np.asarray(plan.dispatch).sum(-1)
    np.testing.assert_array_equal(chosen.sum(0), [capacity] * E)
    np.testing.assert_allclose(weights(plan), chosen * scores, rtol=1e-5)
    if capacity * E < 0.8 * bound * valid.sum():
        np.testing.assert_array_equal(chosen, exact)
    # Where the bound is tight, 100 iterations leave some tokens above it: see ``Cap``.
    greedy = weights(run(preset("expert_choice"), logits, valid, capacity)) > 0
    over = [int((array.sum(1) > bound).sum()) for array in (chosen, greedy)]
    assert over[0] <= over[1] and (chosen * scores).sum() >= (exact * scores).sum() - 1e-5


@seeds
def test_soft_moe(seed: int):
    logits, valid = case(seed, shape=(S, E, 2))
    dispatch, combine = published.soft_moe(logits, valid)
    plan = run(preset("soft_moe", slots_per_expert=2), logits, valid, 2)
    np.testing.assert_allclose(plan.dispatch, dispatch, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(plan.combine, combine, rtol=1e-5, atol=1e-7)
    # The head: unit tokens against unit slots, times a learned scale (section 2.3).
    rng = np.random.default_rng(seed)
    x, slots = rng.normal(size=(S, 6)), rng.normal(size=(6, E, 2))
    unit = slots / np.sqrt((slots**2).sum(0))
    wanted = 1.5 * np.einsum("sm,mep->sep", x / np.sqrt((x**2).sum(1, keepdims=True)), unit)
    parameters = {"slots": slots.astype(np.float32), "log_scale": np.float32(math.log(1.5))}
    head = preset("soft_moe", slots_per_expert=2).head
    found = head.logits(jax.numpy.asarray(x, np.float32), parameters, E)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@seeds
def test_hierarchical(seed: int):
    planes, valid = case(seed, shape=(S, E, 2))
    router = preset("hierarchical", groups=4, k_groups=2, k=1)
    expected, losses = published.hierarchical(planes[..., 0], planes[..., 1], valid, 4, 2, 1)
    close(run(router, planes, valid), expected, losses)


@seeds
@pytest.mark.parametrize(("p", "k_max"), [(0.4, 4), (0.8, 6)])
def test_adaptive_top_p(p: float, k_max: int, seed: int):
    logits, valid = case(seed)
    logits *= 2
    expected, losses = published.adaptive_top_p(logits, valid, p, k_max)
    close(run(preset("adaptive_top_p", p=p, k_max=k_max), logits, valid), expected, losses)
    counts = (expected > 0).sum(1)[valid]
    assert len(set(counts.tolist())) > 1, "tokens take different numbers of experts"
