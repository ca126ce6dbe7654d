"""What the routing and transport tests share: routers, jitted calls, drawn logits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import numpy as np
from hypothesis import settings

from moe_jax import routing
from moe_jax.routing import Capacity, LoadBalance, Plan, Router, Softmax, TopK, ZLoss, preset

Array = np.ndarray

S, E = 8, 4
settings.register_profile("routing", derandomize=True, deadline=None, max_examples=25)
examples = settings.get_profile("routing")

# Grid logits plus fixed noise: rows differ clearly within a token, and no two tokens score the
# same up to rounding, which would leave the order to the precision of the arithmetic.
_NOISE = np.random.default_rng(0).uniform(-0.02, 0.02, (S, E))
drawn_logits = hnp.arrays(np.int32, (S, E), elements=st.integers(-48, 48)).map(
    lambda grid: (grid / 16 + _NOISE).astype(np.float32)
)
drawn_valid = st.one_of(
    st.just(np.ones(S, bool)), hnp.arrays(bool, (S,)), st.just(np.zeros(S, bool))
)
drawn_order = st.permutations(range(S)).map(np.array)
drawn_experts = st.permutations(range(E)).map(np.array)


def _routers() -> dict[str, Router]:
    """Every preset as it is, and every option that no preset's default turns on."""
    presets = {function.__name__: function() for function in routing.PRESETS}
    top2 = Router(Softmax(), TopK(2), (LoadBalance(choices="all"), ZLoss()))
    return presets | {
        "switch+z": preset("switch", z_weight=1e-3),
        "switch_mtf+score": preset("switch_mtf", priority="score"),
        "gshard+all": preset("gshard", second="all"),
        "top2_mtf+threshold+second": preset(
            "top2_mtf", second="threshold", second_balance_weight=5e-3
        ),
        "expert_choice+tokens+z": preset("expert_choice", over="tokens", z_weight=1e-3),
        "top2+token": dataclasses.replace(top2, capacity=Capacity(priority="token")),
        "top2+score": dataclasses.replace(top2, capacity=Capacity(priority="score")),
        "top2+renormalize": dataclasses.replace(top2, capacity=Capacity(renormalize=True)),
    }


ROUTERS = _routers()


@functools.cache
def jitted(router: Router, capacity: int) -> Callable[..., Plan]:
    """Returns the router on one group, compiled once: ``f(logits, valid, key=None)``."""
    return jax.jit(
        lambda logits, valid, key=None: router(logits, capacity=capacity, valid=valid, rng=key)
    )


@functools.cache
def jitted_groups(router: Router, capacity: int) -> Callable[..., Plan]:
    """Returns ``route``, compiled once: ``f(logits, valid, key=None)``."""
    return jax.jit(
        lambda logits, valid, key=None: routing.route(
            router, logits, capacity=capacity, valid=valid, rng=key
        )
    )


def weights(plan: Plan) -> Array:
    """Returns ``(..., S, E)``: how much of each expert a token gets, whatever its slot."""
    return np.asarray(plan.combine).sum(-1)


def seats(plan: Plan) -> Array:
    """Returns ``(..., S, E)``: how many slots of each expert a token has."""
    return np.asarray(plan.dispatch).sum(-1)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Array:
    """Returns float32 normal draws."""
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)
