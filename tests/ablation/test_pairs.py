import dataclasses

import pytest

from moe_jax.ablation.ablation import Published
from moe_jax.ablation.pairs import BELOW, CONCORDANT, DISCORDANT, UNRESOLVED, agreements
from tests.ablation.records import FULL

# The paper prints losses 3.0, 2.9, 2.895 and 2.5 of four arms.
PAPER = Published(
    "A paper", "large", "loss", {"a": 3.0, "b": 2.9, "c": 2.895, "d": 2.5}, measures="loss"
)
ABLATION = dataclasses.replace(
    FULL,
    arms={name: {} for name in "abcd"},
    published=(PAPER, dataclasses.replace(PAPER, measures="tokens_per_second")),
    claims=(),
    threshold_arm="",
    overlay=None,
    sizes=None,
)


def records(**losses):
    return [
        {"arm": arm, "seed": seed, "loss": loss, "tokens_per_second": 1.0}
        for arm, values in losses.items()
        for seed, loss in enumerate(values)
    ]


def test_every_pair_has_a_reading():
    # Three seeds; b is above a for sure, c cannot be told from a, and d is below all.
    (table,) = agreements(
        ABLATION,
        records(
            a=(2.0, 2.1, 2.2),
            b=(2.3, 2.41, 2.5),
            c=(1.9, 2.3, 2.2),
            d=(1.0, 1.11, 1.2),
        ),
    )
    read = {(pair.low, pair.high): reading for pair, reading in table.readings.items()}
    assert read == {
        ("b", "a"): DISCORDANT,
        ("c", "a"): UNRESOLVED,
        ("d", "a"): CONCORDANT,
        ("c", "b"): BELOW,  # printed 0.005 nats apart
        ("d", "b"): CONCORDANT,
        ("d", "c"): CONCORDANT,
    }
    assert table.counts == "3 concordant, 1 discordant, 1 open, 1 below resolution"
    # Printed order d c b a, measured order d a c b: of six pairs, a-b and a-c are exchanged.
    assert table.tau == pytest.approx((4 - 2) / 6)


def test_the_slope_is_one_if_the_numbers_agree():
    same = {arm: (value, value + 0.01) for arm, value in PAPER.values.items()}
    (table,) = agreements(ABLATION, records(**same))
    assert table.slope == pytest.approx(1.0)
    assert table.tau == pytest.approx(1.0)


def test_negated_numbers_have_the_sign_of_the_metric():
    negated = {arm: -value for arm, value in PAPER.values.items()}
    paper = dataclasses.replace(PAPER, values=negated, negated=True)
    ablation = dataclasses.replace(ABLATION, published=(paper,))
    (table,) = agreements(ablation, records(a=(2.0, 2.01), d=(1.0, 1.011)))
    (pair,) = table.pairs
    assert (pair.low, pair.high, pair.published) == ("d", "a", 0.5)
    assert table.tau is None


def test_one_seed_or_one_arm_makes_no_table():
    assert agreements(ABLATION, records(a=(2.0,), b=(3.0,))) == []
    assert agreements(ABLATION, records(a=(2.0, 2.1))) == []


def test_the_order_of_a_table_is_over_the_seeds_of_all_arms():
    # Seeds 2 and 3, which only two arms have, are harder for every arm.
    lines = records(a=(3.0, 3.1), b=(2.9, 3.0, 3.5, 3.6), c=(2.8, 2.9, 3.4, 3.5), d=(2.5, 2.6))
    table = agreements(ABLATION, lines)[0]
    assert table.tau == pytest.approx(1.0)


def test_a_pair_with_a_loss_that_is_not_finite_is_open():
    lines = records(a=(3.0, 3.1, 3.0), d=(2.5, float("nan"), 2.5))
    table = agreements(ABLATION, lines)[0]
    assert list(table.readings.values()) == [UNRESOLVED]
