import dataclasses

import pytest

from moe_jax.ablation.ablation import Ablation, Claim, Gate, Published
from moe_jax.ablation.judgement import failed_gates, judged
from moe_jax.ablation.looks import undecided_arms
from moe_jax.ablation.pairs import agreements
from moe_jax.ablation.verdicts import CONTRADICTED, OPEN, REPRODUCED, UNTESTABLE
from moe_jax.errors import ConfigError
from tests.ablation.records import FULL

CLAIM = Claim("b is lower than a", "loss", "b", "a")
PLAIN = Ablation(
    name="gates",
    title="Gates",
    base=FULL.base,
    arms={"a": {}, "b": {}, "c": {}},
    scales={"cpu": {}},
    seeds=12,
    claims=(CLAIM,),
    registered="0123456789abcdef",
)
BETTER_THAN_ZLIB = Gate("a beats zlib", "a", "bits_above_zlib", most=0.0)


def lines(arm, losses, **metrics):
    return [{"arm": arm, "seed": s, "loss": loss, **metrics} for s, loss in enumerate(losses)]


# b is 0.5 below a at each of four seeds, with differences of 0.49 to 0.51.
APART = lines("a", (2.0, 2.1, 2.2, 2.3), bits_above_zlib=0.2)
APART += lines("b", (1.51, 1.59, 1.7, 1.8))


def gated(*gates):
    return dataclasses.replace(PLAIN, gates=gates)


@pytest.mark.parametrize(
    ("gate", "failed"),
    [
        (BETTER_THAN_ZLIB, True),
        (dataclasses.replace(BETTER_THAN_ZLIB, most=0.2), False),
        (dataclasses.replace(BETTER_THAN_ZLIB, most=1.0, least=0.3), True),
        # The mean over seeds counts, 1.65, although single seeds are above.
        (Gate("b is below 1.66", "b", "loss", most=1.66), False),
        # An arm without the metric fails, and an arm without a run is not judged yet.
        (Gate("b tunes", "b", "best_loss"), True),
        (Gate("c tunes", "c", "best_loss"), False),
        # A positive control must be reproduced.
        (Claim("control", "loss", "b", "a"), False),
        (Claim("control", "loss", "a", "b"), True),
        (Claim("control", "loss", "b", "a", 0.5), True),
        (Claim("control", "loss", "b", "c"), False),
    ],
)
def test_gates_are_ranges_of_means_or_controls(gate, failed):
    assert failed_gates(gated(gate), APART) == ([gate.text] if failed else [])


def test_a_failed_gate_makes_every_claim_and_pair_untestable():
    paper = Published("A paper", "large", "loss", {"a": 3.0, "b": 2.9}, measures="loss")
    whole = [line | {"curve": [[1, line["loss"]]]} for line in APART]
    for gates, verdict, pair in (
        ((), REPRODUCED, "1 concordant"),
        ((BETTER_THAN_ZLIB,), f"{UNTESTABLE}: a beats zlib", f"1 {UNTESTABLE}"),
    ):
        ablation = dataclasses.replace(gated(*gates), published=(paper,))
        (found,) = judged(ablation, whole)
        assert found.text == verdict
        assert found.effect is not None
        (table,) = agreements(ablation, whole)
        assert table.counts == pair


def test_pairs_of_a_registered_ablation_have_the_interval_of_its_look():
    paper = Published("A paper", "large", "loss", {"a": 3.0, "b": 2.9}, measures="loss")
    registered = dataclasses.replace(PLAIN, published=(paper,))
    free = dataclasses.replace(registered, registered="")
    ((wide,), (narrow,)) = (agreements(each, APART)[0].pairs for each in (registered, free))
    assert wide.measured.half_width > 3 * narrow.measured.half_width
    assert str(wide.measured).endswith("(4 seeds)")
    assert "seeds" not in str(narrow.measured)


def test_only_arms_of_open_claims_and_pairs_need_more_seeds():
    # a and b are decided at the first look; c is 0.02 above or below b.
    unsure = APART + lines("c", (1.53, 1.57, 1.72, 1.78))
    whole = [line | {"curve": [[1, line["loss"]]]} for line in unsure]
    assert undecided_arms(PLAIN, whole) == []
    more = dataclasses.replace(PLAIN, claims=(CLAIM, Claim("c is lower than b", "loss", "c", "b")))
    assert [verdict.text for verdict in judged(more, whole)] == [REPRODUCED, OPEN]
    assert undecided_arms(more, whole) == ["b", "c"]

    paper = Published("A paper", "large", "loss", {"a": 3.0, "b": 2.9, "c": 2.8}, measures="loss")
    assert undecided_arms(dataclasses.replace(PLAIN, published=(paper,)), whole) == ["b", "c"]
    # A gate that failed cannot be mended by seeds; a control can.
    assert undecided_arms(dataclasses.replace(more, gates=(BETTER_THAN_ZLIB,)), whole) == []
    control = Claim("control", "loss", "c", "b")
    assert undecided_arms(dataclasses.replace(PLAIN, gates=(control,)), whole) == ["b", "c"]


def test_a_contradicted_control_is_a_failed_gate():
    control = Claim("b is higher", "loss", "a", "b")
    ablation = gated(control)
    whole = [line | {"curve": [[1, line["loss"]]]} for line in APART]
    (found,) = judged(dataclasses.replace(ablation, gates=()), whole)
    assert found.text == REPRODUCED
    (found,) = judged(ablation, whole)
    assert found.text == f"{UNTESTABLE}: b is higher"
    claims = dataclasses.replace(PLAIN, claims=(control,))
    assert judged(claims, whole)[0].text == CONTRADICTED


@pytest.mark.parametrize("gate", [Gate("x", "d", "loss"), Claim("x", "loss", "d", "a")])
def test_a_gate_about_an_unknown_arm_is_rejected(gate):
    with pytest.raises(ConfigError, match="has no arm 'd'"):
        gated(gate)
