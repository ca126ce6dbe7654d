"""Three mixture-of-experts layers from scratch, in plain JAX: read this file first.

Switch (Fedus et al. 2021), GShard's top-2 (Lepikhin et al. 2020) and Expert Choice (Zhou et al.
2022) differ only in the router. A router turns logits into two tensors: ``dispatch (S, E, C)`` is 1
where a token has a slot of an expert, and ``combine (S, E, C)`` holds the gate of that slot. Two
einsums then move tokens to the experts and back. The package computes the same values faster, on
many devices and with padding; ``tests/examples/test_moe_from_scratch.py`` compares them.

Letters: ``S`` tokens of one group, ``E`` experts, ``C`` slots per expert, ``M`` model width,
``F`` hidden width of an expert. Run it: ``python examples/moe_from_scratch.py``.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def slots_per_expert(tokens: int, experts: int, factor: float) -> int:
    """Returns the capacity ``C``: an even share of the tokens, times the capacity factor."""
    return min(tokens, math.ceil(factor * tokens / experts))


def seats(wanted_SxE: Array, before_E: Array, capacity: int) -> Array:
    """Assigns slots in the order of the tokens.

    A token whose position in the queue of its expert is ``C`` or more gets no slot: it is dropped.

    Args:
        wanted_SxE: 1 where a token selects an expert, else 0.
        before_E: Number of tokens that are ahead in the queue of each expert.
        capacity: ``C``.

    Returns:
        An array ``(S, E, C)``, 1 where a token has a slot, else 0.
    """
    position_SxE = before_E + jnp.cumsum(wanted_SxE, axis=0) - wanted_SxE
    return wanted_SxE[..., None] * jax.nn.one_hot(position_SxE.astype(int), capacity)


def balance(probs_SxE: Array, first_SxE: Array) -> Array:
    """Returns the balance loss (Switch, equation 4), which is 1 if the load is even."""
    fraction_E, mean_E = first_SxE.mean(0), probs_SxE.mean(0)
    return probs_SxE.shape[1] * jnp.dot(jax.lax.stop_gradient(fraction_E), mean_E)


def switch(logits_SxE: Array, factor: float = 1.25) -> tuple[Array, Array, Array]:
    """Routes each token to its best expert; the gate is the raw probability of that expert.

    Returns:
        ``dispatch (S, E, C)``, ``combine (S, E, C)`` and the balance loss.
    """
    tokens, experts = logits_SxE.shape
    probs_SxE = jax.nn.softmax(logits_SxE)
    first_SxE = jax.nn.one_hot(probs_SxE.argmax(-1), experts)
    dispatch = seats(first_SxE, jnp.zeros(experts), slots_per_expert(tokens, experts, factor))
    return dispatch, dispatch * probs_SxE[..., None], balance(probs_SxE, first_SxE)


def gshard(
    logits_SxE: Array, factor: float = 2.0, key: Array | None = None
) -> tuple[Array, Array, Array]:
    """Routes each token to its two best experts; both gates are divided by their sum.

    All first choices get slots before any second choice. With a ``key`` (in training) the second
    expert is kept with probability ``min(1, 2 * gate)``; otherwise its slot stays empty.

    Returns:
        ``dispatch (S, E, C)``, ``combine (S, E, C)`` and the balance loss of first choices.
    """
    tokens, experts = logits_SxE.shape
    capacity = slots_per_expert(tokens, experts, factor)
    probs_SxE = jax.nn.softmax(logits_SxE)
    first_SxE = jax.nn.one_hot(probs_SxE.argmax(-1), experts)
    second_SxE = jax.nn.one_hot((probs_SxE - 2 * first_SxE).argmax(-1), experts)
    gates_SxE = probs_SxE * (first_SxE + second_SxE)
    gates_SxE /= gates_SxE.sum(-1, keepdims=True)
    first = seats(first_SxE, jnp.zeros(experts), capacity)
    second = seats(second_SxE, first_SxE.sum(0), capacity)
    if key is not None:
        gate_S = (gates_SxE * second_SxE).sum(-1)
        second *= (gate_S > 0.5 * jax.random.uniform(key, (tokens,)))[:, None, None]
    dispatch = first + second
    return dispatch, dispatch * gates_SxE[..., None], balance(probs_SxE, first_SxE)


def expert_choice(logits_SxE: Array, factor: float = 2.0) -> tuple[Array, Array, Array]:
    """Lets each expert take its ``C`` best tokens; the load is even by construction.

    Returns:
        ``dispatch (S, E, C)``, ``combine (S, E, C)`` and a loss of zero.
    """
    tokens, experts = logits_SxE.shape
    probs_SxE = jax.nn.softmax(logits_SxE)
    capacity = max(1, math.floor(factor * tokens / experts))
    gate_ExC, token_ExC = jax.lax.top_k(probs_SxE.T, capacity)
    dispatch = jax.nn.one_hot(token_ExC, tokens, axis=0)
    return dispatch, dispatch * gate_ExC, jnp.zeros(())


def moe(x_SxM: Array, params: dict[str, Array], router=switch) -> tuple[Array, Array]:
    """Applies the layer to one group: dispatch, experts, combine.

    Args:
        x_SxM: Tokens of the group.
        params: Arrays ``router (M, E)``, ``up (E, M, F)`` and ``down (E, F, M)``.
        router: One of the three functions above.

    Returns:
        The output ``(S, M)``, zero for dropped tokens, and the balance loss.
    """
    logits_SxE = jnp.dot(x_SxM, params["router"], precision="highest")
    dispatch, combine, loss = router(logits_SxE)
    inputs_ExCxM = jnp.einsum("sec,sm->ecm", dispatch, x_SxM)
    hidden_ExCxF = jax.nn.relu(jnp.einsum("ecm,emf->ecf", inputs_ExCxM, params["up"]))
    outputs_ExCxM = jnp.einsum("ecf,efm->ecm", hidden_ExCxF, params["down"])
    return jnp.einsum("sec,ecm->sm", combine, outputs_ExCxM), loss


if __name__ == "__main__":
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"router": (16, 4), "up": (4, 16, 32), "down": (4, 32, 16)}
    weights = {
        name: 0.5 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    group = jax.random.normal(keys[3], (64, 16))
    for rule in (switch, gshard, expert_choice):
        output, auxiliary = moe(group, weights, rule)
        dropped = int((output == 0).all(-1).sum())
        print(f"{rule.__name__}: {dropped} of 64 tokens dropped, balance loss {auxiliary:.3f}")
