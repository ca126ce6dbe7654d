import dataclasses

import pytest

from moe_jax.ablation.ablation import Claim
from moe_jax.ablation.verdicts import CONTRADICTED, OPEN, REPRODUCED, judge


def records(low, high):
    found = [{"arm": "low", "seed": seed, "loss": value} for seed, value in enumerate(low)]
    return found + [{"arm": "high", "seed": seed, "loss": value} for seed, value in enumerate(high)]


# Differences high - low of three seeds with deviation .01 have a half-width of 4.303 * .01 / 3**.5
# = .0248.
@pytest.mark.parametrize(
    ("differences", "margin", "within", "verdict"),
    [
        ((0.09, 0.10, 0.11), 0.0, False, REPRODUCED),
        ((0.09, 0.10, 0.11), 0.07, False, REPRODUCED),
        ((0.09, 0.10, 0.11), 0.09, False, OPEN),
        ((0.09, 0.10, 0.11), 0.13, False, CONTRADICTED),
        ((-0.11, -0.10, -0.09), 0.0, False, CONTRADICTED),
        ((-0.01, 0.0, 0.01), 0.03, True, REPRODUCED),
        ((-0.01, 0.0, 0.01), 0.02, True, OPEN),
        ((-0.11, -0.10, -0.09), 0.05, True, CONTRADICTED),
    ],
)
def test_the_whole_interval_is_on_one_side(differences, margin, within, verdict):
    lines = records((2.0, 3.0, 4.0), [2.0 + d + i for i, d in enumerate(differences)])
    found = judge(Claim("", "loss", "low", "high", margin, within), lines)
    assert found.text == verdict
    assert found.effect.half_width == pytest.approx(0.0248, abs=1e-4)


def test_a_seed_that_never_gets_there_leaves_the_claim_open():
    claim = Claim("", "loss", "low", "high")
    lines = records((2.0, 3.0, 4.0, 5.0), (2.9, 4.0, 5.1, 6.0))
    assert judge(claim, lines).text == REPRODUCED
    never = [{**line, "loss": None} if line["seed"] == 3 else line for line in lines]
    assert judge(claim, never).text == OPEN
    assert judge(claim, never).effect.mean == pytest.approx(1.0)


def with_diverged(lines, **seeds):
    """Some seeds of some arms lose their loss."""
    return [
        {"arm": line["arm"], "seed": line["seed"], "diverged": 7}
        if line["seed"] in seeds.get(line["arm"], ())
        else line
        for line in lines
    ]


def test_an_arm_that_always_diverges_has_the_higher_loss():
    lines, every = records((2.0, 3.0, 4.0), (2.9, 4.0, 5.1)), (0, 1, 2)
    claim, equal = Claim("", "loss", "low", "high"), Claim("", "loss", "low", "high", 9.0, True)
    found = judge(claim, with_diverged(lines, high=every))
    assert (found.text, found.effect, found.measured) == (f"{REPRODUCED}: high diverges", None, "")
    assert judge(claim, with_diverged(lines, low=every)).text == f"{CONTRADICTED}: low diverges"
    # Apart by any margin.
    assert judge(equal, with_diverged(lines, high=every)).text == f"{CONTRADICTED}: high diverges"
    # Nothing is said of what is no loss, of both arms lost, and of one seed.
    other = dataclasses.replace(claim, metric="dropped")
    assert judge(other, with_diverged(lines, high=every)) is None
    assert judge(claim, with_diverged(lines, low=every, high=every)) is None
    assert judge(claim, with_diverged(records((2.0,), (2.9,)), high=every)) is None


def test_an_arm_that_sometimes_diverges_leaves_the_claim_open():
    lines = records((2.0, 3.0, 4.0), (2.99, 4.0, 5.01))
    claim = Claim("", "loss", "low", "high")
    assert judge(claim, lines).text == REPRODUCED
    assert judge(claim, with_diverged(lines, high=(0,))).text == OPEN
    assert judge(claim, with_diverged(lines, low=(0, 1, 2), high=(0,))) is None


def test_only_seeds_of_both_arms_count():
    claim = Claim("", "loss", "low", "high")
    assert judge(claim, records((1.0, 2.0), (1.5,))) is None
    assert judge(claim, records((1.0, 2.0, 9.0), (1.5, 2.5))).effect.mean == 0.5


def test_later_seeds_do_not_change_a_decided_verdict():
    claim = Claim("", "loss", "low", "high")
    low = [2.0, 2.01, 2.02, 2.0]
    four = records(low, [value + 0.5 + 0.001 * i for i, value in enumerate(low)])
    assert judge(claim, four, "c0ffee").text == REPRODUCED
    later = records(low + [2.0] * 4, [v + 0.5 + 0.001 * i for i, v in enumerate(low)] + [2.5] * 4)
    lost = [
        {**line, "loss": None} if (line["arm"], line["seed"]) == ("high", 6) else line
        for line in later
    ]
    assert judge(claim, lost, "c0ffee").text == REPRODUCED
    # A seed that the first look counts leaves the claim open.
    early = [{**line, "loss": None} if line["seed"] == 2 else line for line in later]
    assert judge(claim, early, "c0ffee").text == OPEN
