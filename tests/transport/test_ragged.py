import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.errors import ConfigError
from moe_jax.routing.plan import Slots
from moe_jax.transport.ragged import block_size, in_blocks


def slots(expert, gate, experts):
    """Slots of which only what `in_blocks` reads is true: choices `(G, S, K)` and `E`."""
    expert, gate = jnp.array(expert, jnp.int32), jnp.array(gate, jnp.float32)
    groups, size, _ = expert.shape
    empty = jnp.full((groups, experts, size), size, jnp.int32)
    return Slots(empty, jnp.zeros(empty.shape), jnp.zeros_like(expert), gate, expert, size)


def test_choices_are_sorted_and_each_expert_begins_a_block():
    # One group of 4 tokens, 2 experts: blocks of 8, the smallest, and 4 // 8 + 2 = 2 of them.
    # Token 1 goes to expert 0, in row 0; tokens 0 and 2 to expert 1, in rows 8 and 9. Token 3 got
    # no slot, and is behind all 16 rows.
    laid, owner = in_blocks(slots([[[1], [0], [1], [-1]]], [[[0.5], [0.6], [0.7], [0.0]]], 2))
    none = 4
    assert owner.tolist() == [0, 1]
    assert laid.token.tolist() == [[[1] + 7 * [none], [0, 2] + 6 * [none]]]
    np.testing.assert_allclose(laid.weight, [[[0.6] + 7 * [0], [0.5, 0.7] + 6 * [0]]])
    assert laid.place.tolist() == [[[8], [0], [9], [16]]]
    assert laid.num_tokens == 4


def test_an_expert_with_more_than_a_block_gets_another_and_an_empty_one_none():
    # Two groups of 8 tokens: 16 choices among 2 experts make blocks of 8 and 4 of them. Expert 1
    # has 9 choices in blocks 0 and 1; expert 0 none; the rest are spare, and count as the last's.
    expert = np.ones((2, 8, 1), int)
    expert[1, 1:] = -2
    laid, owner = in_blocks(slots(expert, np.ones((2, 8, 1)), 2))
    assert owner.tolist() == [1, 1, 1, 1]
    assert laid.token[0].tolist() == [list(range(8)), [8] + 7 * [16], 8 * [16], 8 * [16]]


@pytest.mark.parametrize(
    ("choices", "experts", "rows"), [(4, 2, 8), (2048, 16, 128), (2000, 16, 64), (1 << 20, 8, 512)]
)
def test_a_block_is_an_even_share_within_bounds(choices, experts, rows):
    assert block_size(choices, experts) == rows


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 8]), st.sampled_from([1, 2]))
def test_every_choice_with_a_slot_is_in_one_row_of_its_expert(seed, experts, k):
    rng = np.random.default_rng(seed)
    expert = rng.choice(experts, (2, 12, k), p=rng.dirichlet(np.full(experts, 0.3)))
    expert = np.where(rng.random(expert.shape) < 0.2, -1 - expert, expert)
    gate = np.where(expert >= 0, rng.random(expert.shape), 0)
    laid, owner = jax.jit(in_blocks)(slots(expert, gate, experts))
    block = laid.token.shape[-1]
    owners = np.repeat(np.asarray(owner), block)
    token, weight = np.asarray(laid.token).reshape(-1), np.asarray(laid.weight).reshape(-1)
    taken = []
    for s, (experts_of, gates, places) in enumerate(
        zip(expert.reshape(-1, k), gate.reshape(-1, k), np.asarray(laid.place[0]), strict=True)
    ):
        for e, g, row in zip(experts_of, gates, places, strict=True):
            if e < 0:
                assert row == token.size
                continue
            assert (token[row], owners[row]) == (s, e)
            assert weight[row] == np.float32(g)
            taken.append(row)
    assert len(set(taken)) == len(taken) == (token < 24).sum()


def test_experts_that_choose_are_refused():
    table = jnp.zeros((1, 2, 3), jnp.int32)
    with pytest.raises(ConfigError, match="transport='ragged' requires tokens that choose"):
        in_blocks(Slots(table, jnp.zeros(table.shape), None, None, None, 3))
