"""Published routers written out as loops over tokens and experts: nothing shared with the package.

Every function routes one group in float64: logits ``(S, E)``, valid ``(S,)``, capacity ``C``.
"""

from __future__ import annotations

import dataclasses

import numpy as np

Array = np.ndarray


@dataclasses.dataclass
class Routing:
    """What the published pseudo-code returns."""

    combine: Array
    dispatch: Array
    losses: dict[str, float]

    @classmethod
    def empty(cls, tokens: int, experts: int, capacity: int) -> Routing:
        shape = (tokens, experts, capacity)
        return cls(np.zeros(shape), np.zeros(shape), {})

    def seat(self, token: int, expert: int, slot: int, gate: float) -> None:
        assert self.dispatch[:, expert, slot].sum() == 0, "two tokens in one slot"
        self.dispatch[token, expert, slot] = 1
        self.combine[token, expert, slot] = gate


def softmax(row: Array) -> list[float]:
    top = max(row)
    exps = [float(np.exp(np.float64(value) - top)) for value in row]
    return [value / sum(exps) for value in exps]


def best(scores: list[float], without: int | None = None) -> int:
    """Returns the index of the largest score, the first one of equals."""
    winner = None
    for index, score in enumerate(scores):
        if index != without and (winner is None or score > scores[winner]):
            winner = index
    return winner


def z_loss(logits: Array, valid: Array) -> float:
    """ST-MoE (2202.08906) equation 5: mean over real tokens of log(sum exp(logits)) ** 2."""
    total, count = 0.0, 0
    for row, real in zip(logits, valid, strict=True):
        if real:
            total += float(np.log(np.sum(np.exp(row.astype(np.float64))))) ** 2
            count += 1
    return total / max(count, 1)


def switch_loss(logits: Array, tokens: list[int]) -> float:
    """Switch Transformer (2101.03961) equations 4 to 6 without alpha, over ``tokens``."""
    experts = logits.shape[1]
    loss = 0.0
    for expert in range(experts):
        sent, score = 0.0, 0.0
        for token in tokens:
            probabilities = softmax(logits[token])
            sent += best(probabilities) == expert
            score += probabilities[expert]
        loss += sent / max(len(tokens), 1) * score / max(len(tokens), 1)
    return experts * loss


def switch(logits: Array, valid: Array, capacity: int, order: list[int] | None = None) -> Routing:
    """Switch Transformer (2101.03961) section 2.2: raw top-1 gate, first come first served."""
    tokens, experts = logits.shape
    out = Routing.empty(tokens, experts, capacity)
    used = [0] * experts
    for token in range(tokens) if order is None else order:
        if not valid[token]:
            continue
        probabilities = softmax(logits[token])
        expert = best(probabilities)
        if used[expert] < capacity:
            out.seat(token, expert, used[expert], probabilities[expert])
            used[expert] += 1
    real = [token for token in range(tokens) if valid[token]]
    out.losses = {"balance": switch_loss(logits, real), "z": z_loss(logits, valid)}
    return out


def batch_prioritised_switch(logits: Array, valid: Array, capacity: int) -> Routing:
    """V-MoE (2106.05974) section 4: as Switch, tokens in order of their largest gate."""
    key = [-max(softmax(row)) for row in logits]
    return switch(logits, valid, capacity, sorted(range(len(key)), key=key.__getitem__))


def mesh_switch(logits: Array, valid: Array, capacity: int) -> Routing:
    """Mesh-TensorFlow's Switch: padding is in both factors of the loss, which is scaled down."""
    out = switch(logits, valid, capacity)
    everyone = list(range(len(valid)))
    out.losses["balance"] = switch_loss(logits, everyone) * sum(map(bool, valid)) / len(valid)
    return out


def switch_max(logits: Array, valid: Array, capacity: int) -> Routing:
    """Mesh-TensorFlow's ``switch_max``: slots in order of the gates, the loss of its Switch."""
    out = batch_prioritised_switch(logits, valid, capacity)
    out.losses = mesh_switch(logits, valid, capacity).losses
    return out


def gshard(logits: Array, valid: Array, capacity: int, draws: Array | None) -> Routing:
    """GShard (2006.16668) Algorithm 1; without ``draws`` every second expert is asked for."""
    tokens, experts = logits.shape
    out = Routing.empty(tokens, experts, capacity)
    gates = [softmax(row) for row in logits]
    counter = [0] * experts
    second: dict[int, tuple[int, float]] = {}
    for token in range(tokens):
        if not valid[token]:
            continue
        e1 = best(gates[token])
        e2 = best(gates[token], without=e1)
        g1, g2 = gates[token][e1], gates[token][e2]
        second[token] = e2, g2 / (g1 + g2)
        if counter[e1] < capacity:
            out.seat(token, e1, counter[e1], g1 / (g1 + g2))
        counter[e1] += 1
    real = max(len(second), 1)
    means = [sum(gates[token][e] for token in second) / real for e in range(experts)]
    l_aux = sum(counter[e] / real * means[e] for e in range(experts)) / experts
    out.losses = {"l_aux": l_aux, "balance": l_aux * experts**2, "z": z_loss(logits, valid)}
    for token, (e2, g2) in second.items():
        if counter[e2] < capacity and (draws is None or 2 * g2 > draws[token]):
            out.seat(token, e2, counter[e2], g2)
        counter[e2] += 1
    return out


def mesh_top2(
    logits: Array,
    valid: Array,
    capacity: int,
    policy: str,
    threshold: float,
    draws: Array | None = None,
) -> Routing:
    """Mesh-TensorFlow's top-2 (ST-MoE, 2202.08906, appendix G).

    Unlike GShard's, a second choice that is given up takes no place in the queue, and the means of
    the losses divide by all S tokens of the group.
    """
    tokens, experts = logits.shape
    out = Routing.empty(tokens, experts, capacity)
    gates = [softmax(row) for row in logits]
    counter = [0] * experts
    choices: dict[int, tuple[int, int]] = {}
    for token in range(tokens):
        if not valid[token]:
            continue
        e1 = best(gates[token])
        choices[token] = e1, best(gates[token], without=e1)
        if counter[e1] < capacity:
            pair = gates[token][e1] + gates[token][choices[token][1]]
            out.seat(token, e1, counter[e1], gates[token][e1] / pair)
            counter[e1] += 1
    for token, (e1, e2) in choices.items():
        g2 = gates[token][e2] / (gates[token][e1] + gates[token][e2])
        keep = {
            "all": lambda: True,
            "none": lambda: False,
            "threshold": lambda g2=g2: g2 > threshold,
            "random": lambda g2=g2, token=token: draws[token] < g2 / threshold,
        }[policy]()
        if keep and counter[e2] < capacity:
            out.seat(token, e2, counter[e2], g2)
            counter[e2] += 1
    balance, second = 0.0, 0.0
    for expert in range(experts):
        first_sent = sum(e1 == expert for e1, _ in choices.values()) / tokens
        second_sent = sum(e2 == expert for _, e2 in choices.values()) / tokens
        balance += first_sent * sum(gates[token][expert] for token in choices) / tokens
        rest = 0.0
        for token in range(tokens):
            if token not in choices:  # padding has no first choice to leave out
                rest += gates[token][expert]
            elif choices[token][0] != expert:
                rest += gates[token][expert] / (1 - gates[token][choices[token][0]])
        second += second_sent * rest / tokens
    out.losses = {"balance": experts * balance, "second_balance": experts * second}
    return out


def expert_choice(logits: Array, valid: Array, capacity: int) -> Routing:
    """Expert Choice (2202.09368) section 3.2: softmax over experts, top tokens of each expert."""
    tokens, experts = logits.shape
    out = Routing.empty(tokens, experts, capacity)
    scores = [softmax(row) for row in logits]
    real = [token for token in range(tokens) if valid[token]]
    for expert in range(experts):
        ranked = sorted(real, key=lambda token, expert=expert: -scores[token][expert])
        for slot, token in enumerate(ranked[:capacity]):
            out.seat(token, expert, slot, scores[token][expert])
    return out


def mesh_expert_selection(logits: Array, valid: Array, capacity: int) -> Routing:
    """Mesh-TensorFlow's expert selection: softmax over tokens, gates over the number of takers."""
    tokens, experts = logits.shape
    out = Routing.empty(tokens, experts, capacity)
    real = [token for token in range(tokens) if valid[token]]
    if not real:
        out.losses = {"token_balance": 0.0}
        return out
    columns = [dict(zip(real, softmax(logits[real, e]), strict=True)) for e in range(experts)]
    taken = [sorted(real, key=lambda t, c=column: -c[t])[:capacity] for column in columns]
    for expert, picks in enumerate(taken):
        for slot, token in enumerate(picks):
            takers = sum(token in others for others in taken)
            out.seat(token, expert, slot, columns[expert][token] / takers)
    wanted = [sum(column[token] for column in columns) / experts for token in real]
    out.losses = {"token_balance": len(real) * sum(value**2 for value in wanted)}
    return out
