"""Token rounding by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.routing import RoundedTopK, preset
from moe_jax.routing.select.rounded import places
from tests.routing.helpers import select

KEY = jax.random.key(0)
# All but the last token prefer expert 0; 0.9 most of all. The loads are 4 and 1.
SCORES = [[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.8, 0.2], [0.45, 0.55]]


def taken(part: RoundedTopK, valid=None, rng=KEY, scores=SCORES) -> list[list[int]]:
    """The experts that each token wants."""
    choice = select(part, scores, valid, rng=rng)
    rows = zip(np.asarray(choice.expert), np.asarray(choice.wanted), strict=True)
    return [expert[wanted].tolist() for expert, wanted in rows]


def test_loads_round_to_tiles_of_three():
    # 4 is nearest to 3, and 1 to 0. The gate of an only choice is 1 over its sum: the last token
    # of expert 0 goes.
    assert taken(RoundedTopK(1, 3)) == [[0], [0], [0], [], []]
    assert taken(RoundedTopK(1, 3, "down")) == [[0], [0], [0], [], []]
    # Up: 6 of five tokens, and 3: the tokens 0 and 2 have the next highest scores for expert 1.
    assert taken(RoundedTopK(1, 3, "up")) == [[0, 1], [0], [0, 1], [0], [1, 0]]


def test_gates_are_scores_and_a_filling_token_learns_too():
    part = RoundedTopK(1, 3, "up")
    choice = select(part, SCORES, rng=KEY)
    np.testing.assert_array_equal(choice.expert[0], [0, 1])
    np.testing.assert_allclose(choice.gate[0], [0.6, 0.4], rtol=1e-6)


def test_evaluation_does_not_round():
    assert taken(RoundedTopK(1, 3), rng=None) == [[0], [0], [0], [0], [1]]


def test_padding_fills_no_tile():
    valid = [True, True, False, True, True]
    # Three tokens of expert 0 are a tile; the tile of expert 1 has the tokens 4, 0 and 3.
    assert taken(RoundedTopK(1, 3, "up"), valid) == [[0, 1], [0], [], [0, 1], [1]]


def test_the_order_is_by_gates_relative_to_the_tokens_other_choices():
    # Two choices of three: expert 0 has 0.5 of 0.9 of token 0, and 0.4 of 0.6 of token 1, which
    # comes first. Token 2 did not choose it, and has more than token 3, which is padding.
    scores = np.array([[0.5, 0.4, 0.1], [0.4, 0.2, 0.4], [0.2, 0.4, 0.4], [0.9, 0.1, 0]])
    chosen = np.array([[1, 1, 0], [1, 1, 0], [0, 1, 1], [0, 0, 0]], bool)
    valid = np.arange(4) < 3
    found = places(jnp.asarray(chosen), jnp.log(jnp.maximum(scores, 1e-6)), jnp.asarray(valid))
    np.testing.assert_array_equal(found[:, 0], [1, 0, 2, 3])


def test_every_load_is_a_multiple_of_the_tile():
    router = preset("token_rounding", k=2, tile=8)
    logits = jax.random.normal(KEY, (100, 4))
    counts = router(logits, rng=KEY).counts
    assert (np.asarray(counts.demand) % 8 == 0).all() and counts.dropped == 0
    assert router.experts_per_token(100, 4) == 2


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ConfigError, match="k=3 experts per token, but there are 2 experts"):
        preset("token_rounding", k=3).check(2)
