"""The routers against the papers' pseudo-code, on drawn logits, padding and tight capacity."""

from __future__ import annotations

import functools
from collections.abc import Callable

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given

from moe_jax.routing import Plan, Router, preset
from tests.routing import references
from tests.routing.helpers import drawn_logits, drawn_valid, examples, jitted, normal

Reference = Callable[..., references.Routing]

TOP2 = {
    policy: (
        preset("top2_mtf", second=policy, second_balance_weight=5e-3),
        functools.partial(references.mesh_top2, policy=policy, threshold=0.2),
    )
    for policy in ("all", "none", "threshold")
}
DETERMINISTIC: dict[str, tuple[Router, Reference]] = {
    "switch": (preset("switch", z_weight=1e-3), references.switch),
    "switch_mtf": (preset("switch_mtf", z_weight=1e-3), references.mesh_switch),
    "switch_max": (preset("switch_max"), references.switch_max),
    "glam": (preset("glam"), functools.partial(references.gshard, draws=None)),
    "gshard": (
        preset("gshard", second="all", z_weight=1e-3),
        functools.partial(references.gshard, draws=None),
    ),
    "expert_choice": (preset("expert_choice"), references.expert_choice),
    "expert_choice_mtf": (preset("expert_choice_mtf"), references.mesh_expert_selection),
} | {f"top2_mtf-{policy}": pair for policy, pair in TOP2.items()}


def check(plan: Plan, expected: references.Routing) -> None:
    np.testing.assert_array_equal(plan.dispatch, expected.dispatch)
    np.testing.assert_allclose(plan.combine, expected.combine, rtol=2e-5, atol=1e-7)
    for name, value in plan.losses.items():
        np.testing.assert_allclose(value, expected.losses[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("capacity", [1, 3])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_router_is_the_published_one(name: str, capacity: int):
    router, reference = DETERMINISTIC[name]

    @examples
    @given(drawn_logits, drawn_valid)
    def compare(logits, valid):
        check(jitted(router, capacity)(logits, valid), reference(logits, valid, capacity))

    compare()


@pytest.mark.parametrize("capacity", [1, 3])
@pytest.mark.parametrize("name", ["gshard", "top2_mtf"])
def test_random_second_expert_is_the_published_one_for_the_same_draws(name: str, capacity: int):
    reference = {
        "gshard": references.gshard,
        "top2_mtf": functools.partial(references.mesh_top2, policy="random", threshold=0.2),
    }[name]

    @examples
    @given(drawn_logits, drawn_valid, st.integers(0, 2**31 - 1))
    def compare(logits, valid, seed):
        key = jax.random.key(seed)
        draws = np.asarray(jax.random.uniform(key, valid.shape))
        plan = jitted(preset(name), capacity)(logits, valid, key)
        check(plan, reference(logits, valid, capacity, draws=draws))

    compare()


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_group_longer_than_one_block_of_the_queue_is_routed_the_same(name: str):
    # 150 tokens are two blocks of 64 and a part of a third.
    router, reference = DETERMINISTIC[name]
    logits, valid = normal(3, 150, 5), np.random.default_rng(4).random(150) < 0.9
    check(jitted(router, 20)(logits, valid), reference(logits, valid, 20))


def test_gshard_own_balance_value_is_ours_over_experts_squared():
    logits, valid = normal(0, 12, 4), np.ones(12, bool)
    plan = jitted(preset("gshard"), 6)(logits, valid)
    l_aux = references.gshard(logits, valid, 6, None).losses["l_aux"]
    np.testing.assert_allclose(plan.losses["balance"] / 4**2, l_aux, rtol=1e-5)
