"""The later published routers as loops over tokens and experts: nothing shared with the package.

Every function takes one group in float64, logits ``(S, E)`` and valid ``(S,)``, and returns dense
weights ``(S, E)`` of the seated choices and the losses by name. Randomness is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Array = np.ndarray
Choice = tuple[int, float]
Losses = dict[str, float]


def softmax(row: Array) -> list[float]:
    exps = [math.exp(value - max(row)) for value in row]
    return [value / sum(exps) for value in exps]


def ranked(scores: list[float], k: int) -> list[int]:
    """Returns the ``k`` best indices, best first, the earlier one of equals."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]


def seat(
    choices: list[list[Choice]],
    experts: int,
    capacity: int,
    order: list[int] | None = None,
) -> Array:
    """All first choices before any second, tokens in order, first come first served.

    A choice with a gate of ``None`` was given up and stands in no queue.
    """
    weights = np.zeros((len(choices), experts))
    used = [0] * experts
    order = list(range(len(choices))) if order is None else order
    for k in range(max(map(len, choices), default=0)):
        for token in order:
            if k >= len(choices[token]):
                continue
            expert, gate = choices[token][k]
            if gate is None:
                continue
            if used[expert] < capacity:
                weights[token, expert] = gate
            used[expert] += 1
    return weights


def z_loss(logits: Array, valid: Array, zeroed: bool = False) -> float:
    """ST-MoE (2202.08906) equation 5; flaxformer keeps padding, with logits of zero."""
    total, count = 0.0, 0
    for row, real in zip(logits, valid, strict=True):
        if real or zeroed:
            total += math.log(sum(math.exp(v) if real else 1.0 for v in row)) ** 2
            count += 1
    return total / max(count, 1)


def balance(
    probabilities: list[list[float]],
    choices: list[list[Choice]],
    valid: Array,
    divide: bool = False,
    first: bool = False,
) -> float:
    """``E * sum f P``: first choices, all of them, or all divided by their number."""
    experts, real = len(probabilities[0]), max(int(sum(valid)), 1)
    loss = 0.0
    for expert in range(experts):
        sent, score = 0.0, 0.0
        for token, here in enumerate(valid):
            if here:
                chosen = choices[token][:1] if first else choices[token]
                sent += sum(e == expert for e, _ in chosen) / (len(chosen) if divide else 1)
                score += probabilities[token][expert]
        loss += sent / real * score / real
    return experts * loss


def squared_variation(values: list[float]) -> float:
    """Variance over squared mean (Shazeer et al. 2017, 1701.06538, section 4)."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def normal_cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def top_k(
    logits: Array, valid: Array, k: int, capacity: int, normalize: bool = False
) -> tuple[Array, Losses]:
    """Softmax, the k best, gates divided by their sum or not (Mixtral, Qwen, OLMoE, DBRX, …)."""
    probabilities = [softmax(row) for row in logits]
    choices: list[list[Choice]] = []
    for token, real in enumerate(valid):
        best = ranked(probabilities[token], k)
        total = sum(probabilities[token][e] for e in best) if normalize else 1.0
        choices.append([(e, probabilities[token][e] / total) for e in best] if real else [])
    losses = {
        "all": balance(probabilities, choices, valid),
        "mean": balance(probabilities, choices, valid, divide=True),
        "first": balance(probabilities, choices, valid, first=True),
        "z": z_loss(logits, valid),
    }
    return seat(choices, logits.shape[1], capacity), losses


def no_token_left_behind(
    logits: Array, valid: Array, k: int, capacity: int
) -> tuple[Array, Losses]:
    """Switch (2101.03961) appendix B: stage by stage, those left over ask for their next best.

    Its loss counts each token's ``k`` best experts, asked or not. Padding is routed like any token
    in both factors, and the loss is scaled by the share of valid tokens (Mesh-TensorFlow).
    """
    tokens, experts = logits.shape
    weights, used, placed = np.zeros((tokens, experts)), [0] * experts, [False] * tokens
    for stage in range(k):
        for token in range(tokens):
            if not valid[token] or placed[token]:
                continue
            probabilities = softmax(logits[token])
            expert = ranked(probabilities, experts)[stage]
            if used[expert] < capacity:
                weights[token, expert] = probabilities[expert]
                used[expert] += 1
                placed[token] = True
    probabilities = [softmax(row) for row in logits]
    choices = [[(e, 1.0) for e in ranked(p, k)] for p in probabilities]
    loss = balance(probabilities, choices, np.ones(tokens, bool), divide=True)
    return weights, {"balance": loss * float(sum(valid)) / tokens}


def vmoe(
    logits: Array,
    noisy: Array,
    valid: Array,
    k: int,
    capacity: int,
    std: float,
    prioritized: bool = True,
) -> tuple[Array, Losses]:
    """V-MoE (2106.05974) sections 2 and 4: noise, batch priority, importance and load losses."""
    experts, real = logits.shape[1], [t for t in range(len(valid)) if valid[t]]
    probabilities = [softmax(row) for row in noisy]
    choices = [
        [(e, probabilities[t][e]) for e in ranked(probabilities[t], k)] if valid[t] else []
        for t in range(len(valid))
    ]
    order = list(range(len(valid)))
    if prioritized:
        order.sort(key=lambda t: -max(probabilities[t]))
    importance = [sum(softmax(logits[t])[e] for t in real) for e in range(experts)]
    load = []
    for expert in range(experts):
        won = 0.0
        for token in real:
            threshold = sorted(noisy[token], reverse=True)[k - 1]
            won += 1 - normal_cdf((threshold - logits[token][expert]) / std)
        load.append(won)
    losses = {"importance": squared_variation(importance), "load": squared_variation(load)}
    return seat(choices, experts, capacity, order), losses


def noisy_top_k(
    logits: Array, deviation: Array, draws: Array, valid: Array, k: int
) -> tuple[Array, Losses]:
    """Shazeer et al. 2017 (1701.06538) equations 3-5 and appendix A."""
    tokens, experts = logits.shape
    gates = np.zeros((tokens, experts))
    probability = np.zeros((tokens, experts))
    for token in range(tokens):
        if not valid[token]:
            continue
        noisy = [logits[token][e] + draws[token][e] * deviation[token][e] for e in range(experts)]
        kept = ranked(noisy, k)
        for expert, gate in zip(kept, softmax(np.array([noisy[e] for e in kept])), strict=True):
            gates[token, expert] = gate
        for expert in range(experts):
            others = sorted((noisy[e] for e in range(experts) if e != expert), reverse=True)
            distance = logits[token][expert] - others[k - 1]
            probability[token, expert] = normal_cdf(distance / deviation[token][expert])
    losses = {
        "importance": squared_variation(list(gates.sum(0))),
        "load": squared_variation(list(probability.sum(0))),
    }
    return gates, losses


def fairseq_top2(
    logits: Array,
    valid: Array,
    capacity: int,
    *,
    uniform: Array | None = None,
    gumbel: Array | None = None,
    before: bool = False,
    pad_mask: bool = True,
    prioritized: bool = False,
) -> tuple[Array, Losses]:
    """Fairseq's top2gate, flag by flag."""
    tokens, experts = logits.shape
    probabilities = [softmax(row) for row in logits]
    choices: list[list[Choice]] = []
    for token in range(tokens):
        p = probabilities[token]
        e1 = ranked(p, 1)[0]
        second = list(logits[token]) if gumbel is None else list(logits[token] + gumbel[token])
        second[e1] = -math.inf
        e2 = ranked(second, 1)[0]
        total = p[e1] + p[e2] if before else 1.0
        g1, g2 = p[e1] / total, p[e2] / total
        keep = uniform is None or 2 * g2 > uniform[token]
        present = valid[token] or not pad_mask
        choices.append([(e1, g1), (e2, g2 if keep else None)] if present else [])
    order = sorted(range(tokens), key=lambda t: -max(probabilities[t])) if prioritized else None
    weights = seat(choices, experts, capacity, order)
    if not before:
        for token in range(tokens):
            if weights[token].sum() > 0:
                weights[token] /= weights[token].sum()
    loss = 0.0
    for expert in range(experts):
        mean = sum(p[expert] for p in probabilities) / tokens
        sent = sum(bool(c) and c[0][0] == expert for c in choices) / tokens
        loss += mean * sent
    return weights, {"balance": loss * experts}


def deepseek_v2(
    logits: Array, valid: Array, k: int, devices: int, keep: int, scale: float, drop: bool
) -> tuple[Array, Losses]:
    """DeepSeek-V2 (2405.04434) section 2.2: device-limited routing, three losses, dropping."""
    tokens, experts = logits.shape
    size = experts // devices
    probabilities = [softmax(row) for row in logits]
    choices: list[list[Choice]] = []
    for token in range(tokens):
        p = probabilities[token]
        best = [max(p[d * size : (d + 1) * size]) for d in range(devices)]
        allowed = ranked(best, keep)
        inside = [p[e] if e // size in allowed else -1.0 for e in range(experts)]
        choices.append([(e, p[e]) for e in ranked(inside, k)] if valid[token] else [])
    real = max(int(sum(valid)), 1)
    mean = [
        sum(probabilities[t][e] for t in range(tokens) if valid[t]) / real for e in range(experts)
    ]
    f = [
        experts / (k * real) * sum(e == expert for c in choices for e, _ in c)
        for expert in range(experts)
    ]
    device_loss, communication = 0.0, 0.0
    for device in range(devices):
        mine = range(device * size, (device + 1) * size)
        share = sum(mean[e] for e in mine)
        device_loss += sum(f[e] for e in mine) / size * share
        visits = sum(any(e in mine for e, _ in c) for c in choices)
        communication += devices / (keep * real) * visits * share
    losses = {
        "balance": sum(f[e] * mean[e] for e in range(experts)),
        "device_balance": device_loss,
        "communication_balance": communication,
    }
    weights = np.zeros((tokens, experts))
    for device in range(devices):
        wishes = [
            (gate, token, e)
            for token, c in enumerate(choices)
            for e, gate in c
            if e // size == device
        ]
        budget = math.ceil(tokens * k / devices) if drop else len(wishes)
        for gate, token, e in sorted(wishes, key=lambda wish: -wish[0])[:budget]:
            weights[token, e] = scale * gate
    return weights, losses


def sigmoids(row: Array) -> list[float]:
    return [1 / (1 + math.exp(-value)) for value in row]


def root_softplus(row: Array) -> list[float]:
    """DeepSeek-V4's ``sqrtsoftplus``."""
    return [math.sqrt(math.log1p(math.exp(value))) for value in row]


def deepseek_v3(
    logits: Array,
    bias: Array,
    valid: Array,
    k: int,
    groups: int,
    keep: int,
    scale: float,
    score: Callable[[Array], list[float]] = sigmoids,
) -> tuple[Array, Losses]:
    """DeepSeek-V3 (2412.19437) equations 12-20 and its released gate, or another score in it."""
    tokens, experts = logits.shape
    size = experts // groups
    scores = [score(row) for row in logits]
    weights, real = np.zeros((tokens, experts)), max(int(sum(valid)), 1)
    f, mean = [0.0] * experts, [0.0] * experts
    for token in range(tokens):
        if not valid[token]:
            continue
        s = scores[token]
        biased = [s[e] + bias[e] for e in range(experts)]
        value = [
            sum(sorted(biased[g * size : (g + 1) * size], reverse=True)[:2]) for g in range(groups)
        ]
        allowed = ranked(value, keep)
        inside = [biased[e] if e // size in allowed else -math.inf for e in range(experts)]
        chosen = ranked(inside, k)
        for expert in chosen:
            weights[token, expert] = scale * s[expert] / sum(s[e] for e in chosen)
            f[expert] += experts / (k * real)
        for expert in range(experts):
            mean[expert] += s[expert] / sum(s) / real
    return weights, {"balance": sum(a * b for a, b in zip(f, mean, strict=True))}


def sinkhorn(logits: Array, valid: Array, iterations: int) -> Array:
    """Clark et al. 2022 (2202.01169): the plan of alternating row and column normalisation."""
    tokens, experts = logits.shape
    plan = np.exp(logits.astype(np.float64)) * np.asarray(valid, np.float64)[:, None]
    share = max(int(sum(valid)), 1) / experts
    for _ in range(iterations):
        for token in range(tokens):
            if valid[token]:
                plan[token] /= plan[token].sum()
        for expert in range(experts):
            plan[:, expert] *= share / plan[:, expert].sum()
    return plan


def soft_moe(logits: Array, valid: Array) -> tuple[Array, Array]:
    """Soft MoE (2308.00951) algorithm 1 for logits ``(S, E, P)``: dispatch and combine."""
    tokens, experts, slots = logits.shape
    dispatch, combine = np.zeros(logits.shape), np.zeros(logits.shape)
    for expert in range(experts):
        for slot in range(slots):
            total = sum(math.exp(logits[t, expert, slot]) for t in range(tokens) if valid[t])
            for token in range(tokens):
                if valid[token]:
                    dispatch[token, expert, slot] = math.exp(logits[token, expert, slot]) / total
    for token in range(tokens):
        if valid[token]:
            combine[token] = np.reshape(softmax(logits[token].reshape(-1)), (experts, slots))
    return dispatch, combine


def hierarchical(
    secondary: Array, primary: Array, valid: Array, groups: int, k_groups: int, k: int
) -> tuple[Array, Losses]:
    """Shazeer et al. 2017, appendix B: ``G_primary(x)_i * G_i(x)_j``, both normalised top-k."""
    tokens, experts = secondary.shape
    size, weights = experts // groups, np.zeros(secondary.shape)
    for token in range(tokens):
        if not valid[token]:
            continue
        means = [primary[token, g * size : (g + 1) * size].mean() for g in range(groups)]
        kept = ranked(means, k_groups)
        for group, outer in zip(kept, softmax(np.array([means[g] for g in kept])), strict=True):
            inside = list(secondary[token, group * size : (group + 1) * size])
            chosen = ranked(inside, k)
            inner = softmax(np.array([inside[e] for e in chosen]))
            for expert, gate in zip(chosen, inner, strict=True):
                weights[token, group * size + expert] = outer * gate
    return weights, {"importance": squared_variation(list(weights.sum(0)))}


def adaptive_top_p(logits: Array, valid: Array, p: float, k_max: int) -> tuple[Array, Losses]:
    """Huang et al. 2024 (2403.07652) section 2.2: the fewest experts whose probability is p."""
    weights, entropy = np.zeros(logits.shape), 0.0
    choices: list[list[Choice]] = []
    probabilities = [softmax(row) for row in logits]
    for token, real in enumerate(valid):
        choices.append([])
        if not real:
            continue
        total = 0.0
        for expert in ranked(probabilities[token], k_max):
            choices[-1].append((expert, probabilities[token][expert]))
            weights[token, expert] = probabilities[token][expert]
            total += probabilities[token][expert]
            if total >= p:
                break
        entropy -= sum(q * math.log(q) for q in probabilities[token])
    losses = {
        "entropy": entropy / max(int(sum(valid)), 1),
        "balance": balance(probabilities, choices, valid),
    }
    return weights, losses
