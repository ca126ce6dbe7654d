"""What the routing and transport tests share: parts by hand, jitted calls, drawn logits."""

from __future__ import annotations

import functools
from collections.abc import Callable

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings

from moe_jax import routing
from moe_jax.routing import Inputs, Plan, Router, Scored

Array = np.ndarray

S, E = 8, 4
settings.register_profile("routing", derandomize=True, deadline=None, max_examples=25)
examples = settings.get_profile("routing")
few_examples = settings(examples, max_examples=6)  # for what runs on every preset

# Fixed noise on grid logits: rows differ clearly within a token, and no two tokens score the
# same up to rounding, which would leave the order to the precision of the arithmetic.
_NOISE = np.random.default_rng(0).uniform(-0.02, 0.02, (S, E))
drawn_logits = hnp.arrays(np.int32, (S, E), elements=st.integers(-48, 48)).map(
    lambda grid: (grid / 16 + _NOISE).astype(np.float32)
)
drawn_valid = st.one_of(
    st.just(np.ones(S, bool)), hnp.arrays(bool, (S,)), st.just(np.zeros(S, bool))
)


# The tests compile several hundred small programs and run each for a moment.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def inputs(logits, valid=None, capacity: int = 1, ids=None, rng=None, **state) -> Inputs:
    """Returns one group's inputs from logits ``(S, E)`` or ``(S, E, P)`` typed out by hand."""
    planes = jnp.asarray(logits, jnp.float32)
    planes = planes if planes.ndim == 3 else planes[..., None]
    valid = jnp.ones(len(planes), bool) if valid is None else jnp.asarray(valid, bool)
    ids = None if ids is None else jnp.asarray(ids, jnp.int32)
    state = {name: jnp.asarray(value) for name, value in state.items()}
    return Inputs(planes[..., 0], planes, valid, capacity, ids, rng, state)


def scored(scores, noise_std=None, clean=None, noisy=None) -> Scored:
    """Returns scores ``(S, E)`` typed out by hand, without noise if none is given."""
    scores = jnp.asarray(scores, jnp.float32)
    clean = scores if clean is None else jnp.asarray(clean, jnp.float32)
    log_scores, log_clean = (jnp.log(jnp.maximum(x, 1e-37)) for x in (scores, clean))
    noisy = log_scores if noisy is None else jnp.asarray(noisy)
    noise_std = None if noise_std is None else jnp.asarray(noise_std)
    return Scored(scores, clean, noisy, noise_std, log_scores, log_clean)


def select(part: routing.Select, scores, valid=None, **given):
    """Returns what a selection makes of scores ``(S, E)``, whose logits are their logarithms."""
    made = scored(scores)
    return part(made, inputs(made.noisy, valid, **given))


@functools.cache
def jitted(router: Router, capacity: int) -> Callable[..., Plan]:
    """Returns the router on one group, compiled once: ``f(logits, valid, key, ids, state)``."""
    return compiled(
        lambda logits, valid, key=None, ids=None, state=None: router(
            logits, capacity=capacity, valid=valid, token_ids=ids, rng=key, state=state
        )
    )


@functools.cache
def jitted_groups(router: Router, capacity: int) -> Callable[..., Plan]:
    """Returns ``route``, compiled once: ``f(logits, valid, key, ids, state, record)``."""
    return compiled(
        lambda logits, valid, key=None, ids=None, state=None, record=None: routing.route(
            router,
            logits,
            capacity=capacity,
            valid=valid,
            token_ids=ids,
            rng=key,
            state=state,
            record=record,
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
