"""Experts with arrays of their own give the sums of experts whose arrays are stacked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.grouped import Choices, on_choices, on_separate
from moe_jax.grouped.separate import block_sizes
from moe_jax.nn.feed_forward import FeedForwardConfig

WIDTH, HIDDEN, EXPERTS = 4, 6, 3


def choices_of(expert, gate):
    """The choices ``expert (T, K)`` in the order of experts, with -1 for a dropped choice."""
    flat = np.where(np.array(expert) < 0, EXPERTS, expert).reshape(-1)
    order = np.argsort(flat, kind="stable")
    place = np.empty(len(flat), int)
    place[order] = np.arange(len(flat))
    sizes = np.bincount(flat, minlength=EXPERTS + 1)[:EXPERTS]
    rows = np.arange(len(flat)) < sizes.sum()
    token = np.where(rows, order // np.shape(expert)[1], len(expert))
    place = np.where(flat < EXPERTS, place, len(flat)).reshape(np.shape(expert))
    weight = np.where(rows, np.array(gate).reshape(-1)[order], 0)
    fields = token, weight.astype(np.float32), place, sizes
    return Choices(*map(jnp.asarray, fields))


CASES = {
    "one token": [[2, 0]],
    "an expert with all tokens, and one with none": [[0, 1]] * 5,
    # Blocks of 4 and 8 rows: experts 0 and 1 have 9 and 11 rows and take two blocks of 8, and
    # expert 2 has 2 rows and takes one of 4.
    "several blocks of one expert": [[0, 1]] * 9 + [[2, 1]] * 2,
    # Blocks of 16, 32, 48 and 64 rows: expert 0 has 70 rows and takes blocks of 64 and 16, expert 1
    # has 100 and takes 64 and 48, and expert 2 has 30 and takes 32.
    "many rows": [[0, 1]] * 70 + [[2, 1]] * 30,
    "dropped choices": [[0, -1], [-1, -1], [2, 1]],
}


@pytest.mark.parametrize("gate_on", ["in", "out", "none"])
@pytest.mark.parametrize("name", CASES)
def test_sums_equal_those_of_stacked_experts(name, gate_on):
    network = FeedForwardConfig(WIDTH, HIDDEN, "silu", gated=True, bias=True)
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    stacked = {"up": drawn(EXPERTS, WIDTH, HIDDEN), "gate": drawn(EXPERTS, WIDTH, HIDDEN)}
    stacked |= {"down": drawn(EXPERTS, HIDDEN, WIDTH), "down_bias": drawn(EXPERTS, WIDTH)}
    stacked |= {"up_bias": drawn(EXPERTS, HIDDEN), "gate_bias": drawn(EXPERTS, HIDDEN)}
    own = [{name: x[e].T for name, x in stacked.items()} for e in range(EXPERTS)]
    expert = CASES[name]
    tokens, gate = drawn(len(expert), WIDTH), drawn(len(expert), 2)
    choices = choices_of(expert, gate)
    expected = on_choices(network, stacked, tokens, gate, choices, gate_on)
    found = jax.jit(lambda *args: on_separate(network, *args, gate_on))(own, tokens, choices)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_block_has_the_rows_of_most_experts():
    # 16 tokens choose 2 of 8 experts: 4 rows per expert, so blocks of 8, and of 4 for most experts.
    assert block_sizes(16, 32, 8) == (4, 8)
    # 68 rows per expert: a block of 64 and one of 16 have 12 rows of padding.
    assert block_sizes(272, 544, 8) == (16, 32, 48, 64)
    assert block_sizes(40, 80, 2) == (16, 32, 48)  # No expert has more than 40 rows.
    assert block_sizes(80, 160, 8) == (16, 32)  # 20 rows per expert.
    assert block_sizes(4, 8, 8) == (2,)  # A block of one row would take as long.
    assert block_sizes(1, 2, 8) == (1,)  # One token gives an expert one row.
    assert block_sizes(2000, 4000, 2) == (16, 32, 48, 64)


def test_one_token_reads_no_matrix_of_an_expert_without_rows():
    """All products are in the loops over the blocks of experts; experts without rows have none."""
    width, hidden = 64, 128
    network = FeedForwardConfig(width, hidden, "silu", gated=True)
    shapes = {"up": (hidden, width), "gate": (hidden, width), "down": (width, hidden)}
    own = [{name: jnp.ones(shape) for name, shape in shapes.items()} for _ in range(EXPERTS)]
    choices = choices_of([[2, 0]], [[0.5, 0.5]])
    program = jax.jit(lambda *args: on_separate(network, *args))
    text = program.lower(own, jnp.ones((1, width)), choices).compile().as_text()
    assert " dot(" in text
    assert " dot(" not in text[text.index("ENTRY") :]
